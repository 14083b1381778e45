"""Stress: random kills, signals, full disks and starts on other meshes; the losses stay those of a run left alone.

    python tests/stress/run.py --rounds 20 --seed 0 --json OUT

A round is one run: three faults, drawn from a deck by the seed, then a last start that ends it; half of the runs change
their mesh once. Every loss and norm has to equal, bit for bit, that of a run that nothing happened to, and that
changed its mesh at the same step. Runs lie on a small disk of their own (a tmpfs where one may be mounted, which takes
root), so that it can be filled.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"

import torch  # noqa: E402

from tests.stress.faults import ALONE, DECK, PATIENCE, Scene, full_disk, kill, kill_launcher  # noqa: E402
from tests.stress.runs import CORPORA, MESHES, STEPS, Expected, ranks_of, records, saved, write_texts  # noqa: E402

Fault = Callable[[Scene], None]
DISK = "48m"
OFTEN = [3 if ranks_of(mesh) == 2 else 1 for mesh in MESHES]
"""How often a mesh is drawn: two ranks are the fewest that need each other."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="begin no round after so many; 0: no limit")
    parser.add_argument("--json", type=Path, help="where the report goes, written after each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    chance = random.Random(options.seed)
    rounds: list[dict[str, Any]] = []
    with small_disk() as (place, disk):
        texts = place / "texts"
        write_texts(texts)
        expected = Expected(place, texts)
        deck = deal(chance, disk is not None)
        for number in range(options.rounds):
            if options.minutes and time.monotonic() - begin > 60 * options.minutes:
                break
            faults = [next(deck) for _ in range(3)] if number % 10 != 9 else list(ALONE)
            told = play(number, faults, chance, place, (disk or place) / f"round-{number}", texts, expected)
            rounds.append(told)
            print(json.dumps(told), flush=True)
            if options.json:
                write(options.json, report(options.seed, rounds, time.monotonic() - begin, disk is not None))
    print(json.dumps(report(options.seed, rounds, time.monotonic() - begin, disk is not None)["counts"], indent=1))
    return 0 if rounds and all(told["right"] for told in rounds) else 1


def deal(chance: random.Random, may_fill: bool) -> Iterator[Fault]:
    """Faults in a random order, again and again."""
    while True:
        deck = [fault for fault in DECK if may_fill or fault is not full_disk]
        chance.shuffle(deck)
        yield from deck


def play(
    number: int, faults: list[Fault], chance: random.Random, place: Path, folder: Path, texts: Path, expected: Expected
) -> dict[str, Any]:
    """One run, with what happened to it and whether it ended right."""
    mesh, corpus, background = chance.choices([*MESHES], OFTEN)[0], chance.choice(CORPORA), chance.random() < 0.5
    other = chance.choice([name for name in MESHES if name != mesh]) if chance.random() < 0.5 else mesh
    changes_at = chance.randint(1, len(faults)) if faults != ALONE else -1
    meshes: list[tuple[int, str]] = [(0, mesh)]
    told: dict[str, Any] = {"round": number, "corpus": corpus, "async": background, "faults": [], "right": False}
    begin = time.monotonic()
    try:
        for index, fault in enumerate([*faults, None]):
            if index == changes_at and other != mesh:
                meshes = changed(meshes, max(saved(folder), default=0), other)
            scene = Scene(place, folder, texts, meshes[-1][1], corpus, background, chance)
            if fault is not None and records(folder)[-1:] and saved(folder)[-1:] == [STEPS]:
                continue  # the run has ended already
            if fault is not None:
                told["faults"].append(scene.told)
                scene.told |= {"kind": fault.__name__, "mesh": scene.mesh}
                fault(scene)
            elif (ended := scene.start().wait(PATIENCE)).statuses != [0] * ranks_of(scene.mesh):
                raise AssertionError(f"the last start: {ended.statuses} {ended.text}")
        got, want = records(folder), expected.of(meshes, corpus)
        differ = [step for (step, *_), a, b in zip(want, got, want, strict=False) if a != b]
        told["meshes"] = [f"{name} after step {step}" for step, name in meshes]
        if len(got) != len(want) or differ:
            raise AssertionError(f"{len(got)} steps of {len(want)}; other losses in steps {differ}")
        told["right"] = True
    except (AssertionError, OSError, IndexError, subprocess.TimeoutExpired) as error:
        told["wrong"] = f"{type(error).__name__}: {error}"[:4000]
    told["seconds"] = round(time.monotonic() - begin, 1)
    return told


def changed(meshes: list[tuple[int, str]], step: int, mesh: str) -> list[tuple[int, str]]:
    """The run's meshes, with another from ``step`` on: a run that has saved nothing begins again on it."""
    return [(0, mesh)] if step == 0 else [*meshes, (step, mesh)]


@contextlib.contextmanager
def small_disk() -> Iterator[tuple[Path, Path | None]]:
    """A folder to work in, and a small disk in it; None where none may be mounted."""
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        place, disk = Path(name), Path(name) / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "stress", str(disk)], capture_output=True, check=False
        )
        try:
            yield place, disk if mounted.returncode == 0 else None
        finally:
            if mounted.returncode == 0:
                subprocess.run(["umount", "-l", str(disk)], check=False)


def report(seed: int, rounds: list[dict[str, Any]], seconds: float, filled: bool) -> dict[str, Any]:
    """What was done, in numbers, and each round."""
    faults = [(fault, told) for told in rounds for fault in told["faults"]]
    counts = collections.Counter(fault["kind"] for fault, _ in faults)
    kills = [(f, told) for f, told in faults if f["kind"] in (kill.__name__, kill_launcher.__name__)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "seed": seed,
        "seconds": round(seconds),
        "disk": f"tmpfs of {DISK}" if filled else "none that could be filled",
        "counts": {
            "rounds": len(rounds),
            "right": sum(told["right"] for told in rounds),
            **counts,
            "kills in a save": sum(f.get("moment") == "in a save" for f, _ in kills),
            "kills of runs that save in the background": sum(told["async"] for _, told in kills),
            "changes of mesh": sum(len(told.get("meshes", ())) > 1 for told in rounds),
        },
        "rounds": rounds,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
