"""The learning rate at every step, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dtensor.config.schema import Config, LrScheduler, Optimizer, Training
from moe_dtensor.train.optimizer import Schedule, lr_factor


def factors(steps: int, **fields: object) -> list[float]:
    config = LrScheduler(**{"min_lr_ratio": 0.1, **fields})  # type: ignore[arg-type]
    return [lr_factor(step, steps, config) for step in range(1, steps + 1)]


def test_warmup_starts_above_zero_and_reaches_the_peak() -> None:
    assert factors(10, warmup_steps=4, decay="constant") == [0.25, 0.5, 0.75] + [1.0] * 7


def test_no_warmup_starts_at_the_peak() -> None:
    assert factors(3, warmup_steps=0, decay="constant") == [1.0] * 3
    assert factors(5, warmup_steps=0, decay="linear", min_lr_ratio=0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_linear() -> None:
    assert factors(6, warmup_steps=2, decay="linear") == pytest.approx([0.5, 1.0, 0.775, 0.55, 0.325, 0.1])


def test_cosine() -> None:
    want = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert factors(6, warmup_steps=2, decay="cosine") == pytest.approx([0.5, *want])


def test_wsd_holds_then_falls() -> None:
    want = [0.5, *[1.0] * 7, 0.55, 0.1]
    assert factors(10, warmup_steps=2, decay="wsd", decay_fraction=0.2) == pytest.approx(want)
    assert factors(4, warmup_steps=0, decay="wsd", decay_fraction=0.0) == [1.0] * 4


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 8, 20])
@pytest.mark.parametrize("steps", [1, 8])
def test_any_lengths(decay: str, warmup: int, steps: int) -> None:
    values = factors(steps, warmup_steps=warmup, decay=decay, decay_fraction=1.0)
    assert all(0.0 < value <= 1.0 for value in values)


def test_optimizer_follows_and_state_resumes() -> None:
    config = Config(
        optimizer=Optimizer(lr=0.8),
        training=Training(steps=6),
        lr_scheduler=LrScheduler(warmup_steps=4, decay="constant"),
    )
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizers = [
        torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:2]}]),
        torch.optim.AdamW(weights[2:]),
    ]
    schedule = Schedule(optimizers, config)
    seen = []
    for _ in range(4):
        assert all(group["lr"] == schedule.lr for optimizer in optimizers for group in optimizer.param_groups)
        seen.append(schedule.lr)
        schedule.step()
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8])
    again = Schedule(optimizers, config)
    again.load_state_dict({"steps": 2})
    assert again.lr == pytest.approx(0.6)
    assert optimizers[0].param_groups[1]["lr"] == again.lr
    assert again.state_dict() == {"steps": 2}
