"""A run's state, written on one mesh and placement of experts, is the same bits on any other, and goes on alike."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import read_batch, train_step

CONFIG = override(
    Config(),
    {
        "model.num_layers": 4,
        "model.dim": 32,
        "model.num_heads": 8,
        "model.num_kv_heads": 2,
        "model.qk_norm": "head",
        "moe.num_experts": 8,
        "moe.hidden_dim": 16,
        "moe.num_shared_experts": 1,
        # What is carried from step to step: biases and loads; and noise that goes by the sequences read so far.
        "moe.bias_rate": 0.02,
        "moe.balance_loss": 0.1,
        "moe.balance_over": "batch",
        "moe.jitter": 0.1,
        "data.corpus": "random",
        "training.seq_len": 8,
        "training.global_batch_size": 8,
        "training.microbatch_size": 1,
        "training.dtype": "float64",
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
    },
)
SAVED_AFTER = 2


@dataclass(frozen=True)
class Place:
    """A mesh (dp, pp, tp) and where its experts live."""

    mesh: tuple[int, int, int]
    experts: str

    @property
    def ranks(self) -> int:
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.mesh))} {self.experts}"


@dataclass(frozen=True)
class Task:
    """Go on from the checkpoint in ``read``, or train anew; save into ``write``; take two more steps."""

    config: Config
    place: Place
    read: Path | None
    write: Path


@dataclass(frozen=True)
class Outcome:
    digests: dict[str, str]
    """Of each full tensor and each value of the state that was loaded or saved."""
    losses: list[float]
    """Of the steps that follow."""


def work(tasks: Sequence[Task]) -> list[Outcome]:
    return [_one(task) for task in tasks]


def _one(task: Task) -> Outcome:
    dp, pp, tp = task.place.mesh
    changes = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "mesh.experts": task.place.experts}
    config = resolve(override(task.config, changes), task.place.ranks)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, corpus)
    read, write = (
        CheckpointManager(
            folder, config, list(trainer.parts), trainer.optimizers, trainer.schedule, loader, trainer.balance
        )
        for folder in (task.read or task.write, task.write)
    )
    if task.read:
        assert read.load_latest() == SAVED_AFTER
    else:
        for _ in range(SAVED_AFTER):
            train_step(trainer, read_batch(trainer, loader))
    write.save(SAVED_AFTER)
    digests = digests_of(write, trainer, loader)
    losses = [train_step(trainer, read_batch(trainer, loader)).loss.item() for _ in range(2)]
    return Outcome(digests, losses)


def digests_of(manager: CheckpointManager, trainer: Trainer, loader: Loader) -> dict[str, str]:
    state = manager._tensors()
    tensors = {**state["model"], **state["optimizer"], **state["balance"]}
    found = {
        key: digest((value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().tobytes())
        for key, value in tensors.items()
        if isinstance(value, torch.Tensor)
    }
    others = {"loader": loader.state_dict(), "schedule": trainer.schedule.state_dict()}
    return found | {key: digest(repr(value).encode()) for key, value in others.items()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run(tasks: Sequence[Task], timeout: float) -> dict[Task, Outcome]:
    """Each task once, those of as many ranks in one start of them; of pipeline ranks the states together."""
    outcomes = {}
    by_ranks = sorted(tasks, key=lambda task: task.place.ranks)
    for ranks, group in itertools.groupby(by_ranks, key=lambda task: task.place.ranks):
        same = list(group)
        for task, *of_ranks in zip(same, *run_on_ranks(work, ranks, same, timeout=timeout), strict=True):
            digests: dict[str, str] = {}
            for outcome in of_ranks:
                assert outcome.losses == of_ranks[0].losses
                assert all(digests.get(key, value) == value for key, value in outcome.digests.items()), task.place
                digests |= outcome.digests
            outcomes[task] = Outcome(digests, of_ranks[0].losses)
    return outcomes


def there_and_back(
    folder: Path, source: Place, targets: Sequence[Place], timeout: float = 120.0, **changes: int
) -> None:
    """The source's state on every target, and what that saves on the source again: one state, the same next steps."""
    config = override(CONFIG, {key.replace("__", "."): value for key, value in changes.items()})
    first = Task(config, source, None, folder / f"{source}")
    there = [Task(config, target, first.write, folder / f"{source} to {target}") for target in targets]
    back = [Task(config, source, task.write, folder / f"{task.write.name} and back") for task in there]
    expected = run([first], timeout)[first]
    for legs in (there, back):
        for task, found in run(legs, timeout).items():
            keys = expected.digests | found.digests
            wrong = [key for key in keys if expected.digests.get(key) != found.digests.get(key)]
            assert not wrong, f"{task.write.name}: {wrong}"
            assert found.losses == pytest.approx(expected.losses, rel=1e-10), task.write.name
    assert {"layers.1.moe.experts.w_up", "bias", "loader", "state.output.weight.exp_avg_sq"} <= set(expected.digests)
    assert expected.losses[0] != expected.losses[1]


def test_another_mesh_and_placement(tmp_path: Path) -> None:
    target = Place((1, 2, 2), "tp_hidden")
    there_and_back(tmp_path, Place((2, 1, 2), "dp_tp"), [target], model__num_layers=2, moe__num_experts=4)


@pytest.mark.full
def test_every_mesh_and_placement(tmp_path: Path) -> None:
    tp, dp, tp_hidden, dp_tp = (Place((2, 2, 2), experts) for experts in ("tp", "dp", "tp_hidden", "dp_tp"))
    others = [
        Place((1, 1, 1), "tp"),
        Place((8, 1, 1), "tp"),
        Place((8, 1, 1), "dp"),
        Place((1, 1, 4), "tp"),
        Place((1, 1, 4), "tp_hidden"),
        Place((1, 4, 2), "tp"),
        Place((1, 4, 2), "tp_hidden"),
    ]
    there_and_back(tmp_path / "a", tp, [*others, dp, tp_hidden, dp_tp], timeout=900.0)
    there_and_back(tmp_path / "b", dp, [tp_hidden], timeout=900.0)
    there_and_back(tmp_path / "c", tp_hidden, [dp_tp], timeout=900.0)
    there_and_back(tmp_path / "d", dp_tp, [dp, Place((1, 1, 1), "tp")], timeout=900.0)
