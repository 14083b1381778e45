"""The launcher: real processes, its status and words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_dtensor.train.run_folder import HANG_FOLDER
from tests.processes import children, is_alive

from .starts import tiny


def launch(folder: Path, *words: str, **changes: str) -> subprocess.Popen[str]:
    options = ["launch", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "moe_dtensor", *options, *tiny(folder, **changes), *words]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def holder(folder: Path, other_than: int = 0) -> int:
    """The process of rank 0, once the run has taken a step."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            pid = json.loads((folder / ".lease.json").read_text())["pid"]
            if pid != other_than and (folder / "metrics.jsonl").read_text():
                return pid
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise TimeoutError


def wait_for_children(process: subprocess.Popen[str], number: int) -> None:
    end = time.monotonic() + 120
    while len(children(process.pid)) < number and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def listens(pid: int) -> bool:
    """Whether a process handles SIGTERM: Python itself takes a moment to begin."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("ranks", "seconds", "name"),
    [
        (2, 0.5, "SIGTERM"),
        pytest.param(0, 0.0, "SIGTERM", marks=pytest.mark.full),
        pytest.param(2, 0.3, "SIGUSR1", marks=pytest.mark.full),
        pytest.param(2, 2.0, "SIGINT", marks=pytest.mark.full),
        pytest.param(2, 4.0, "SIGHUP", marks=pytest.mark.full),
    ],
)
def test_a_signal_in_the_first_seconds(tmp_path: Path, ranks: int, seconds: float, name: str) -> None:
    """Before a rank listened, its status was 1: a scheduler would not have started the run again."""
    process = launch(tmp_path / "run")
    while not listens(process.pid):
        time.sleep(0.002)
    wait_for_children(process, ranks)
    time.sleep(seconds)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert "error: " not in output
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_a_signal_to_one_rank_alone(tmp_path: Path, seconds: float) -> None:
    """Before the first step the others waited for it for two minutes, and the status was 1."""
    process = launch(tmp_path / "run")
    wait_for_children(process, 2)
    _, last = children(process.pid)
    while not listens(last):
        time.sleep(0.002)
    time.sleep(seconds)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    os.kill(last, signal.SIGTERM)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert time.monotonic() - begin < 60
    assert "Traceback" not in output
    assert "error: " not in output


def files_of(folder: Path) -> dict[Path, bytes]:
    """All of a run but the reports of hangs: a rank that was frozen may tell where it was."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if HANG_FOLDER not in path.relative_to(folder).parts}


@pytest.mark.full
def test_a_thawed_run_writes_nothing(tmp_path: Path) -> None:
    """Launcher and ranks frozen, the run ended by a second launcher, the first thawed: both wrote the same files."""
    folder = tmp_path / "run"
    changes = {"training__steps": "600", "checkpoint__interval": "100", "run__fresh": "false"}
    # A collective that outlasts its time while it is frozen would be the error that is told.
    changes["comm__timeout_seconds"] = "600"
    first = launch(folder, **changes)
    holder(folder)
    frozen = [first.pid, *children(first.pid)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    second = launch(folder, **changes)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    written = files_of(folder)
    for pid in reversed(frozen):
        os.kill(pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 1, output
    assert output.count("error: ") == 1
    assert "lost the run in" in output
    assert files_of(folder) == written


@pytest.mark.full
def test_its_life(tmp_path: Path) -> None:
    """Killed with -9 it left ranks that trained on; a killed rank was a trace of torchrun's; a signal saved nothing."""
    folder = tmp_path / "run"
    first = launch(folder, training__steps="100000", checkpoint__interval="100000")
    rank_0 = holder(folder)
    ranks = [pid for pid in children(first.pid) if is_alive(pid)]
    assert rank_0 in ranks
    first.kill()
    first.communicate()
    end = time.monotonic() + 5
    while any(map(is_alive, ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, ranks))

    second = launch(folder, training__steps="100000", checkpoint__interval="100000")
    rank_0 = holder(folder, rank_0)
    victim = next(pid for pid in children(second.pid) if pid != rank_0)
    os.kill(victim, signal.SIGKILL)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert output.count("error: ") == 1, output
    assert "was killed by SIGKILL" in output
    assert "Traceback" not in output

    (folder / "metrics.jsonl").unlink()
    third = launch(folder, training__steps="100000", checkpoint__interval="100000")
    holder(folder, rank_0)
    third.terminate()
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 75, output
    assert output.count("which is saved; the same command goes on") == 1
    assert "error: " not in output
