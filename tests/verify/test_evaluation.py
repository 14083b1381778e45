"""Evaluation is the oracle's under every schedule, between steps and after them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from moe_dtensor.config.load import load, override
from moe_dtensor.config.schema import Config, Schedule
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.step import evaluate
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.oracle import IGNORED, steps
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.subject import load_parameters, own_share

DEBUG = load(Path(__file__).parents[2] / "train_configs" / "debug.toml")


@pytest.mark.parametrize("pp", [2, pytest.param(3, marks=pytest.mark.full)])
def test_every_schedule_evaluates_to_the_oracles_loss(pp: int) -> None:
    """torch's own ``eval`` asserted under ZBVZeroBubble and DualPipeV, and set stages up anew between modes."""
    layouts = [Layout(1, pp, 1, schedule) for schedule in get_args(Schedule)]
    miniature = override(shrink(DEBUG, layouts), {"optimizer.lr": 0.01, "lr_scheduler.warmup_steps": 0})
    for verdict in prove([Case(layout, miniature, steps=3) for layout in layouts]):
        assert verdict.ok, (verdict.schedule, verdict.worst, verdict.failure)
        losses = [d for d in verdict.deviations if d.kind == "validation"]
        assert losses
        assert max(d.error for d in losses) < 1e-9


def _over_two_batches(config: Config) -> float:
    trainer = build(config, torch.device("cpu"))
    load_parameters(trainer, initial_values(config))
    return float(evaluate(trainer, (own_share(trainer, batch) for batch in uneven_batches(config))))


def uneven_batches(config: Config) -> list:
    """The second has one target in a sequence."""
    first, second = global_batch(config, 1), global_batch(config, 2)
    for microbatch in second:
        microbatch.labels[:, 1:] = IGNORED
        microbatch.labels[:, 0] = 3
    return [first, second]


def test_the_validation_loss_is_a_mean_of_targets_not_of_batches() -> None:
    """It was the mean of the batches' means, in which a target of a batch with few of them weighs more."""
    config = Layout(2, 1, 1).place(override(shrink(DEBUG, [Layout(2, 1, 1)]), {"optimizer.lr": 1e-30}))
    batches = uneven_batches(config)
    targets = [sum(int((m.labels != IGNORED).sum()) for m in batch) for batch in batches]
    losses = [float(answer.validation or 0) for b in batches for answer in steps(config, initial_values(config), [b])]
    expected = sum(a * b for a, b in zip(losses, targets, strict=True)) / sum(targets)
    assert abs(expected - sum(losses) / 2) > 1e-3
    for found in run_on_ranks(_over_two_batches, 2, config):
        assert found == pytest.approx(expected, rel=1e-12)
