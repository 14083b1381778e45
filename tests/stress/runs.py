"""The run that is put under stress: tiny, with all that is carried from step to step; and what it should give."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.starts import Ended, Start, tiny

STEPS, INTERVAL = 40, 4
MESHES = {"dp2": (2, 1, 1), "tp2": (1, 1, 2), "pp2": (1, 2, 1), "one": (1, 1, 1), "dp2 tp2": (2, 1, 2)}
CORPORA = ("random", "datasets")
SLOWER = 0.05
"""Seconds added to each step, so that a fault meets the run on its way."""


def ranks_of(mesh: str) -> int:
    dp, pp, tp = MESHES[mesh]
    return dp * pp * tp


def write_texts(folder: Path) -> None:
    """Records for the streamed corpus."""
    folder.mkdir(parents=True)
    words, chance = ["expert", "router", "token", "gate", "mesh", "rank"], random.Random(1)
    for number in range(3):
        lines = (json.dumps({"text": " ".join(chance.choices(words, k=chance.randint(1, 40)))}) for _ in range(200))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")


def command(folder: Path, texts: Path, mesh: str, corpus: str, background: bool, **more: str) -> list[str]:
    """The command line of the run; ``background`` writes checkpoints beside the training."""
    dp, pp, tp = MESHES[mesh]
    changes = {
        "training__steps": str(STEPS),
        "training__microbatch_size": "2",
        "checkpoint__interval": str(INTERVAL),
        "checkpoint__async_save": str(background).lower(),
        "mesh__dp": str(dp),
        "mesh__pp": str(pp),
        "mesh__tp": str(tp),
        "moe__group_sequences": "2",
        "moe__bias_rate": "0.02",
        "moe__balance_loss": "0.1",
        "moe__balance_over": "batch",
        "moe__jitter": "0.1",
        "data__corpus": corpus,
        "data__path": str(texts) if corpus == "datasets" else "",
        "comm__timeout_seconds": "300",
    }
    return tiny(folder, **{**changes, **more})


def prepare(rank: int) -> None:
    """In each rank: slower steps, and a lease that is lost sooner than in earnest."""
    from moe_dtensor.train import lease, loop

    take = loop.train_step

    def step(*args):  # type: ignore[no-untyped-def]
        time.sleep(SLOWER)
        return take(*args)

    loop.train_step = step
    lease.RENEW_SECONDS, lease.STALE_SECONDS = 0.5, 10.0


def start(place: Path, argv: list[str], mesh: str, before: Callable[[int], None] = prepare) -> Start:
    return Start(place, argv, ranks_of(mesh), before=before)


def records(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of the gradient of every step that the run's folder tells of."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break  # being written
        found.append((record["step"], record["loss"], record["grad_norm"]))
    return found


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints."""
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))


class Expected:
    """Losses of runs that were left alone, kept by mesh and corpus; of each the checkpoint of every step is kept.

    Of every step: a run that is asked to end saves between two intervals, and may go on from there on another mesh.
    """

    def __init__(self, place: Path, texts: Path) -> None:
        self.place, self.texts = place, texts
        self._known: dict[tuple, Path] = {}

    def of(self, meshes: list[tuple[int, str]], corpus: str) -> list[tuple[int, float, float]]:
        """Of a run on ``meshes``: (first step after which it holds, mesh)."""
        return records(self._folder(tuple(meshes), corpus))

    def _folder(self, meshes: tuple[tuple[int, str], ...], corpus: str) -> Path:
        key = (meshes, corpus)
        if key in self._known:
            return self._known[key]
        *before, (step, mesh) = meshes
        first = self._folder(tuple(before), corpus) if before else None
        folder = self.place / f"expected-{len(self._known)}"
        if first is not None:  # another mesh: from that run's checkpoint of the step
            shutil.copytree(first, folder)
            for later in saved(folder):
                if later > step:
                    shutil.rmtree(folder / "checkpoints" / f"step-{later:08d}")
            assert saved(folder)[-1:] == [step]
            run = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**run, "finished_step": None, "saved_step": step}))
        every = {"checkpoint__interval": "1", "checkpoint__keep_last": "0"}
        argv = command(folder, self.texts, mesh, corpus, False, **every)
        ended: Ended = Start(self.place, argv, ranks_of(mesh)).wait(600)
        assert ended.statuses == [0] * ranks_of(mesh), ended.text
        self._known[key] = folder
        return folder
