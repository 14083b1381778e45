"""What may happen to a run, each with what has to come of it. Each leaves a folder that the same command goes on in."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dtensor.train.sinks import last_step
from tests.stress.runs import INTERVAL, STEPS, command, ranks_of, records, saved, start
from tests.train.starts import Ended, Start
from tests.train.test_launch import children, is_alive

PATIENCE = 300.0


@dataclass
class Scene:
    """A run that something is about to happen to."""

    place: Path
    folder: Path
    texts: Path
    mesh: str
    corpus: str
    background: bool
    chance: random.Random
    told: dict[str, Any] = field(default_factory=dict)
    """What happened, for the report."""

    def __post_init__(self) -> None:
        self.begun_before = number_of(self.folder / "run.json")

    def command(self, **more: str) -> list[str]:
        return command(self.folder, self.texts, self.mesh, self.corpus, self.background, **more)

    def start(self) -> Start:
        return start(self.place, self.command(), self.mesh)

    def wait_for_step(self, started: Callable[[], bool]) -> int:
        """A step on the way, drawn by chance, once it is taken; or 0 if the run ended first."""
        first = max(saved(self.folder), default=0)
        wanted = self.chance.randint(first + 1, max(first + 1, min(first + 8, STEPS - 2)))
        inside = self.chance.random() < 0.5
        if inside:  # while the checkpoint of the next interval is written
            wanted = min(-(-wanted // INTERVAL) * INTERVAL, STEPS)
        for _ in poll(started, 0.003):
            if number_of(self.folder / "run.json") == self.begun_before:
                continue  # not begun: the metrics are those of the start before
            if inside and any((self.folder / "checkpoints").glob(f".step-{wanted:08d}.*.partial")):
                break
            if last_step(self.folder / "metrics.jsonl") >= wanted + inside:
                time.sleep(self.chance.random() * 0.2)
                break
        else:
            return 0
        self.told |= {"step": wanted, "moment": "in a save" if inside else "in a step"}
        return wanted


def number_of(path: Path) -> int:
    """The inode of a file that each start replaces with its first step; 0 without one."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def poll(started: Callable[[], bool], seconds: float = 0.02) -> Iterator[None]:
    end = time.monotonic() + PATIENCE
    while started() and time.monotonic() < end:
        yield
        time.sleep(seconds)


def runs(started: Start) -> Callable[[], bool]:
    """Whether rank 0 still does."""
    return lambda: is_alive(started.pids[0])


def check(right: bool, what: str, ended: Ended | str) -> None:
    if not right:
        raise AssertionError(f"{what}\n{ended if isinstance(ended, str) else f'{ended.statuses} {ended.text}'}")


def kill(scene: Scene) -> None:
    """SIGKILL to any rank, at any moment."""
    started = scene.start()
    rank = scene.chance.randrange(ranks_of(scene.mesh))
    scene.wait_for_step(runs(started))
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pids[rank], signal.SIGKILL)
    ended = started.wait(PATIENCE)
    scene.told |= {"rank": rank, "statuses": ended.statuses}
    check("Traceback" not in ended.text, "a trace", ended)
    check(ended.statuses[rank] in (-9, 0), "not killed", ended)


def preempt(scene: Scene) -> None:
    """A signal to any rank: saved, status 75, no step lost."""
    started = scene.start()
    rank = scene.chance.randrange(ranks_of(scene.mesh))
    name = scene.chance.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
    scene.wait_for_step(runs(started))
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pids[rank], getattr(signal, name))
    ended = started.wait(PATIENCE, grace=60)
    taken = len(records(scene.folder))
    scene.told |= {"rank": rank, "signal": name, "statuses": ended.statuses, "steps taken": taken}
    wanted = 0 if taken == STEPS else 75  # the last step leaves nothing to end early
    check(ended.statuses == [wanted] * ranks_of(scene.mesh), "statuses", ended)
    check(saved(scene.folder)[-1] == taken, f"step {taken} was taken, {saved(scene.folder)} are saved", ended)


def full_disk(scene: Scene) -> None:
    """The disk is full for a while; the run goes on, and what it had saved stays whole."""
    before = saved(scene.folder)
    started = scene.start()
    scene.wait_for_step(runs(started))
    ballast = scene.folder.parent / "ballast"
    with ballast.open("wb") as file:
        fill(file.fileno())
        taken = len(records(scene.folder))
        for_saves = time.monotonic() + 60
        for _ in poll(runs(started)):  # until a save has met it
            if any("was not written" in f.read_text() for f in started.files if f.exists()):
                break
            if time.monotonic() > for_saves:
                break
    at_end = scene.chance.random() < 0.3
    if not at_end:
        ballast.unlink()
    ended = started.wait(PATIENCE, grace=60)
    ballast.unlink(missing_ok=True)
    met = ended.text.count("was not written")
    scene.told |= {"full from step": taken, "failed saves": met, "full to the end": at_end, "statuses": ended.statuses}
    check(len(set(ended.statuses)) == 1 and ended.statuses[0] in (0, 1), "statuses", ended)
    check(ended.statuses[0] == 0 or "could not be saved" in ended.text, "no word", ended)
    check("Traceback" not in ended.text, "a trace", ended)
    # What tidying frees after a save may be room for the next one.
    check(met > 0 or saved(scene.folder)[-1:] == [STEPS], "no save met the full disk, and the last is missing", ended)
    check(not before or saved(scene.folder)[-1] >= before[-1], "a checkpoint is lost", ended)


def fill(number: int) -> None:
    """Take all room of a file's disk."""
    block = b"\0" * (1 << 16)
    while True:
        try:
            if os.write(number, block) == 0:
                return
        except OSError:
            if len(block) == 1:
                return
            block = block[: len(block) // 2]


def second_starter(scene: Scene) -> None:
    """The same command again while the run is on: refused with 2, naming the holder; the first goes on."""
    started = scene.start()
    scene.wait_for_step(runs(started))
    os.kill(started.pids[0], 0)
    second = start(scene.place, scene.command(training__steps=str(STEPS)), scene.mesh).wait(PATIENCE)
    held = "is held by process" in second.text
    first = started.wait(PATIENCE)
    scene.told |= {"second": second.statuses, "first": first.statuses}
    check(first.statuses == [0] * ranks_of(scene.mesh), "the first", first)
    check((held and set(second.statuses) == {2}) or "is finished" in second.text, "the second", second)


def frozen(scene: Scene) -> None:
    """All ranks stopped; another start takes the run over and ends it; the first are thawed, end, and write nothing."""
    started = scene.start()
    scene.wait_for_step(runs(started))
    for pid in started.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    second = scene.start().wait(PATIENCE)
    seen = (scene.folder / "metrics.jsonl").read_bytes()
    for pid in started.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    first = started.wait(PATIENCE)
    scene.told |= {"second": second.statuses, "thawed": first.statuses}
    check(second.statuses == [0] * ranks_of(scene.mesh), "the second", second)
    finished = first.statuses == [0] * ranks_of(scene.mesh)
    check(finished or "lost the run in" in first.text, "the first", first)
    check((scene.folder / "metrics.jsonl").read_bytes() == seen, "written after the run was lost", first)


def launched(scene: Scene, *options: str, **more: str) -> subprocess.Popen[str]:
    words = ["launch", "--standalone", "--nproc-per-node", str(ranks_of(scene.mesh)), *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_dtensor", *words, *scene.command(**more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def kill_launcher(scene: Scene) -> None:
    """SIGKILL to torchrun's own process: no rank stays."""
    process = launched(scene)
    scene.wait_for_step(lambda: process.poll() is None)
    ranks = children(process.pid) if process.poll() is None else []
    process.kill()
    output, _ = process.communicate(timeout=PATIENCE)
    for _ in poll(lambda: any(map(is_alive, ranks))):
        pass
    scene.told |= {"status": process.returncode, "ranks": len(ranks)}
    check(not any(map(is_alive, ranks)), "ranks stay", output)


def restart_by_launcher(scene: Scene) -> None:
    """A rank is killed, torchrun starts all again: they resume, though the command asks for a fresh start."""
    process = launched(scene, "--max-restarts", "1", run__fresh="true")
    first = (scene.folder / "run.json").stat().st_ino if (scene.folder / "run.json").exists() else 0

    def begun() -> bool:
        return (scene.folder / "run.json").exists() and (scene.folder / "run.json").stat().st_ino != first

    for _ in poll(lambda: process.poll() is None):
        if begun() and len(saved(scene.folder)) and records(scene.folder)[-1][0] > INTERVAL:
            break
    at = saved(scene.folder)[-1]
    ranks = children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(scene.chance.choice(ranks), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    scene.told |= {"status": process.returncode, "saved when killed": at}
    check(process.returncode == 0, "status", output)
    check("Starting the ranks again (1 of 1)." in output or "finished" in output, "not started again", output)
    check(output.count("Resuming the run in") == 1 or at == STEPS, "not resumed", output)


DECK: list[Callable[[Scene], None]] = (
    17 * [kill] + 10 * [preempt] + 5 * [full_disk] + 2 * [second_starter] + [frozen] + 3 * [kill_launcher]
)
"""Twenty kills, ten pre-emptions, five full disks."""
ALONE: list[Callable[[Scene], None]] = [restart_by_launcher]
"""What starts its run over: once, in a run of its own."""
