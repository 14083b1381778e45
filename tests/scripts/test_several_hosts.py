"""Hosts as network namespaces that a bridge joins: ``run_train.sh`` on each, told nothing but the endpoint.

Every namespace has this machine's name, which resolves to no address there: as on Debian, and in many containers.
Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 6
FLAGS = ["--training.steps", str(STEPS), "--training.seq_len", "32", "--training.global_batch_size", "8"]
FLAGS += ["--training.microbatch_size", "1", "--model.dim", "64", "--moe.hidden_dim", "32", "--model.num_layers", "2"]
FLAGS += ["--checkpoint.enable", "true", "--checkpoint.interval", "2", "--lr_scheduler.warmup_steps", "2"]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Four namespaces, 10.77.0.1 to 10.77.0.4 on one bridge, which is in a namespace of its own."""
    tag = f"moe{os.getpid() % 10000}"
    switch, names = f"{tag}s", [f"{tag}h{i}" for i in range(4)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{tag}{i}", "netns", switch, "type", "veth", "peer", "name", "net0", "netns", name)
            ip("-n", switch, "link", "set", f"{tag}{i}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            kill(name)
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, folder: Path, hosts: int, *more: str, root: Path = ROOT, **environment: str) -> subprocess.Popen:
    """``run_train.sh`` of the code in ``root`` on a host; its output goes to ``<folder>/<host>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"NNODES": str(hosts), "NGPU": "1", "RDZV_ENDPOINT": "10.77.0.1:29500", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(root / "run_train.sh"), *FLAGS, "--run.folder", str(folder / "run"), *more]
    with (folder / f"{host}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            env=os.environ | variables | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def finish(processes: list[subprocess.Popen], folder: Path, seconds: float = 400) -> None:
    for process in processes:
        code = process.wait(seconds)
        logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
        assert code == 0, logs


def kill(host: str) -> None:
    """All that runs on a host, at once: torchrun's ranks are no children of its process group."""
    pids = subprocess.run(["ip", "netns", "pids", host], check=False, capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_host(hosts: list[str], tmp_path: Path, count: int) -> None:
    one = start(hosts[3], tmp_path / "one", 1, NGPU=str(count))
    finish([one], tmp_path / "one")
    finish([start(host, tmp_path / "all", count) for host in hosts[:count]], tmp_path / "all")
    assert losses(tmp_path / "all") == losses(tmp_path / "one")
    assert f"host 1 of {count}, address 10.77.0.2, interface net0" in (tmp_path / f"all/{hosts[1]}.log").read_text()


@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_host_and_a_resume(hosts: list[str], tmp_path: Path, count: int) -> None:
    constant = ["--lr_scheduler.decay", "constant"]
    running = [start(host, tmp_path / "run", count, "--training.steps", "400", *constant) for host in hosts[:count]]
    deadline = time.monotonic() + 400
    while not list((tmp_path / "run/run").glob("checkpoint*/step-*/.metadata")):
        assert time.monotonic() < deadline, (tmp_path / f"run/{hosts[0]}.log").read_text()
        time.sleep(0.5)
    kill(hosts[1])
    running[1].wait()
    for i, process in enumerate(running):
        assert i == 1 or process.wait(300) != 0
    steps = max(int(path.name[5:]) for path in (tmp_path / "run/run").glob("checkpoint*/step-*"))
    end = ["--training.steps", str(steps + 2), *constant]
    finish([start(host, tmp_path / "run", count, *end) for host in hosts[:count]], tmp_path / "run")
    finish([start(hosts[3], tmp_path / "one", 1, *end, NGPU=str(count))], tmp_path / "one")
    assert losses(tmp_path / "run") == losses(tmp_path / "one")
    assert max(losses(tmp_path / "run")) == steps + 2


def told(process: subprocess.Popen, folder: Path, host: str) -> list[str]:
    """The errors of a host that failed."""
    assert process.wait(120) == 1
    log = (folder / f"{host}.log").read_text()
    assert "Traceback" not in log
    return [line for line in log.splitlines() if line.startswith("error:")]


def test_network_faults_are_one_sentence(hosts: list[str], tmp_path: Path) -> None:
    wrong = start(hosts[0], tmp_path, 2, RDZV_ENDPOINT="10.77.0.99:29500", RDZV_TIMEOUT="6")
    (line,) = told(wrong, tmp_path, hosts[0])
    assert "10.77.0.99 port 29500 was not reached; no answer" in line
    # A firewall: what is sent to the first host's address goes nowhere.
    ip("-n", hosts[1], "route", "add", "blackhole", "10.77.0.1/32")
    pair = [start(host, tmp_path, 2, RDZV_TIMEOUT="12") for host in hosts[:2]]
    lines = [told(process, tmp_path, host)[0] for process, host in zip(pair, hosts, strict=False)]
    assert "1 of 2 hosts came: 10.77.0.1." in lines[0]
    assert "10.77.0.1 port 29500 was not reached" in lines[1]
    ip("-n", hosts[1], "route", "del", "blackhole", "10.77.0.1/32")


def test_another_config_on_one_host_is_one_sentence(hosts: list[str], tmp_path: Path) -> None:
    pair = [
        start(host, tmp_path, 2, "--optimizer.lr", lr) for host, lr in zip(hosts[:2], ("1e-3", "2e-3"), strict=True)
    ]
    lines = [told(process, tmp_path, host)[0] for process, host in zip(pair, hosts, strict=False)]
    assert lines[0] == lines[1]
    assert "the hosts differ in flags: 10.77.0.1 has" in lines[0]


def test_other_code_on_one_host_is_one_sentence(hosts: list[str], tmp_path: Path) -> None:
    other = tmp_path / "code"
    for name in ("moe_dtensor", "scripts", "train_configs"):
        shutil.copytree(ROOT / name, other / name)
    for name in ("run_train.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, other / name)
    with (other / "moe_dtensor/placement.py").open("a") as file:
        file.write("# changed\n")
    roots = (ROOT, other)
    pair = [start(host, tmp_path, 2, root=root) for host, root in zip(hosts[:2], roots, strict=True)]
    lines = [told(process, tmp_path, host)[0] for process, host in zip(pair, hosts, strict=False)]
    assert lines[0] == lines[1]
    assert "the hosts differ in code (moe_dtensor/): 10.77.0.1 has" in lines[0]


def until_a_step(folder: Path, host: str) -> None:
    """Return when one is done."""
    deadline = time.monotonic() + 400
    while not (folder / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline, (folder / f"{host}.log").read_text()
        time.sleep(0.5)


def pids_of(host: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def test_a_rank_that_is_killed_on_the_second_host_is_named_there(hosts: list[str], tmp_path: Path) -> None:
    pair = [start(host, tmp_path, 2, "--training.steps", "4000") for host in hosts[:2]]
    until_a_step(tmp_path, hosts[0])
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in pids_of(hosts[1])}
    (rank,) = (
        pid for pid, words in commands.items() if b"train" in words and b"launch" not in words and b"-u" in words
    )
    os.kill(rank, signal.SIGSEGV)
    assert [process.wait(120) for process in pair] == [1, 1]
    log = (tmp_path / f"{hosts[1]}.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("error:")] == [
        f"error: rank 1 on {socket.gethostname()} was killed by SIGSEGV."
    ]
    assert "Traceback" not in log


def test_a_link_that_breaks_ends_all_within_the_timeout(hosts: list[str], tmp_path: Path) -> None:
    more = ["--training.steps", "4000", "--comm.timeout_seconds", "20"]
    pair = [start(host, tmp_path, 2, *more) for host in hosts[:2]]
    until_a_step(tmp_path, hosts[0])
    ip("-n", hosts[1], "link", "set", "net0", "down")
    broke = time.monotonic()
    for process, host in zip(pair, hosts, strict=False):
        assert process.wait(200) == 1
        log = (tmp_path / f"{host}.log").read_text()
        assert [line for line in log.splitlines() if "error:" in line], log
    assert time.monotonic() - broke < 90
