"""One step: what is not finite, validation, and a user's own loss and corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import evaluate, read_batch, train_step

SMALL = {
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "moe.num_experts": 4,
    "moe.hidden_dim": 16,
    "training.seq_len": 16,
    "training.global_batch_size": 4,
    "training.microbatch_size": 1,
    "training.param_dtype": "float32",
    "lr_scheduler.warmup_steps": 1,
}


def start(overrides: dict[str, object]) -> tuple[Trainer, Loader]:
    config = resolve(override(Config(), SMALL | overrides), torch.distributed.get_world_size())
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    return build(config, torch.device("cpu")), Loader(config, corpus)


def whole(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for part in trainer.parts for name, p in part.named_parameters()}


class Poisoned:
    """A runner that leaves one infinite number in rank 0's piece of one gradient."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        loss = self.trainer.runner.step(batch, scale)
        if torch.distributed.get_rank() == 0:
            next(self.trainer.parts[0].parameters()).grad.to_local()[0, 0] = float("inf")
        return loss


def _poisoned_step() -> tuple[bool, bool, bool]:
    """Rank 0 alone makes an infinite gradient: is the step finite, are parameters as before, does the next one work?"""
    trainer, loader = start({"mesh.dp": 2, "mesh.tp": 2})
    before = whole(trainer)
    result = train_step(replace(trainer, runner=Poisoned(trainer)), read_batch(trainer, loader))
    after = whole(trainer)
    again = train_step(trainer, read_batch(trainer, loader))
    return bool(result.finite), all(torch.equal(before[name], after[name]) for name in before), bool(again.finite)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all() -> None:
    assert run_on_ranks(_poisoned_step, 4) == [(False, True, True)] * 4


def _two_losses(overrides: dict[str, object]) -> list[float]:
    trainer, loader = start(overrides)
    return [train_step(trainer, read_batch(trainer, loader)).loss.item() for _ in range(2)]


def test_cpu_offload_changes_nothing_on_cpu_ranks() -> None:
    """It once asked for pinned memory there, which needs a GPU."""
    offloaded = run_on_ranks(_two_losses, 2, {"mesh.dp": 2, "fsdp.cpu_offload": True})
    assert offloaded == run_on_ranks(_two_losses, 2, {"mesh.dp": 2})


def _validation() -> tuple[float, float, float]:
    trainer, loader = start({"mesh.pp": 2})
    batch = read_batch(trainer, loader)
    before = whole(trainer)
    first, second = evaluate(trainer, [batch]).item(), evaluate(trainer, [batch]).item()
    assert all(torch.equal(before[name], value) for name, value in whole(trainer).items())
    return first, second, train_step(trainer, batch).loss.item()


def test_validation_changes_nothing_and_is_near_the_training_loss() -> None:
    for first, second, training in run_on_ranks(_validation, 2):
        assert first == second
        # The same weights and tokens; only the routing differs (plain top-k).
        assert first == pytest.approx(training, rel=0.05)


def _own_parts(loss: str, tp: int) -> tuple[float, float]:
    trainer, loader = start({"training.loss": loss, "data.corpus": f"{__name__}:Squares", "mesh.tp": tp})
    result = train_step(trainer, read_batch(trainer, loader))
    return result.loss.item(), result.grad_norm.item()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_loss_and_a_corpus_of_ones_own(tp: int) -> None:
    """``training.loss`` and ``data.corpus`` take package.module:Name; see docs/own_parts.md."""
    ours = run_on_ranks(_own_parts, tp, "cross_entropy", tp)[0]
    own = run_on_ranks(_own_parts, tp, f"{__name__}:plain_cross_entropy", tp)[0]
    halved = run_on_ranks(_own_parts, tp, f"{__name__}:half_cross_entropy", tp)[0]
    assert own == pytest.approx(ours, rel=1e-5)
    assert halved == pytest.approx([value / 2 for value in ours], rel=1e-5)


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The whole vocabulary arrives, whatever tp, and no padding."""
    assert logits.shape[-1] == 257
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view_as(labels)


def half_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return plain_cross_entropy(logits, labels) / 2


class Squares:
    """A corpus of one's own: the squares, as text."""

    def __init__(self, config: Config) -> None:
        from moe_dtensor.data.tokenizer import build_tokenizer

        self.tokenizer = build_tokenizer("bytes")

    def documents(self, split: str) -> Iterator[str]:
        start = 0 if split == "train" else 5000
        return (" ".join(str(n * n) for n in range(first, first + 50)) for first in range(start, start + 1000, 50))

    def fingerprint(self) -> str:
        return "squares"


def test_the_stop_policy_looks_before_it_saves() -> None:
    """Run._must_stop must see a step that was not finite although later ones were."""
    from moe_dtensor.train.loop import Run

    run = object.__new__(Run)
    run.config = override(Config(), {"metrics.log_interval": 10, "checkpoint.interval": 4, "training.steps": 100})
    run.unfinite = torch.zeros((), dtype=torch.bool)
    stops = []
    for step in range(1, 5):
        run.step = step
        stops.append(run._must_stop(SimpleNamespace(finite=torch.tensor(step != 2))))
    assert stops == [False, False, False, True]
