"""Known ways to get the update, the evaluation and the checkpoint wrong; see ``mutations.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_dtensor.config.resolve import microbatches
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.parallel import accumulation, gradients
from moe_dtensor.train import optimizer, step
from moe_dtensor.train.optimizer import Optimizers
from moe_dtensor.verify import run


@contextmanager
def optimizer_never_steps() -> Iterator[None]:
    with mock.patch.object(step, "update", lambda trainer, finite: trainer.schedule.step()):
        yield


@contextmanager
def gradient_ascent() -> Iterator[None]:
    right = step.update

    def wrong(trainer: Any, finite: Tensor) -> None:
        for part in trainer.parts:
            for param in part.parameters():
                param.grad.neg_()
        right(trainer, finite)

    with mock.patch.object(step, "update", wrong):
        yield


def _with_options(change: Any) -> Iterator[None]:
    """AdamW is made with other options than the config's."""
    right = optimizer.AdamW

    def wrong(groups: Any, **options: Any) -> Any:
        change(groups, options)
        return right(groups, **options)

    with mock.patch.object(optimizer, "AdamW", wrong):
        yield


@contextmanager
def learning_rate_times_ten() -> Iterator[None]:
    right = step.update

    def wrong(trainer: Any, finite: Tensor) -> None:
        for one in trainer.optimizers:
            for group in one.param_groups:
                group["lr"] *= 10
        right(trainer, finite)

    with mock.patch.object(step, "update", wrong):
        yield


@contextmanager
def no_clipping() -> Iterator[None]:
    with mock.patch.object(gradients, "clip"):
        yield


@contextmanager
def no_weight_decay() -> Iterator[None]:
    yield from _with_options(lambda groups, _options: [group.update(weight_decay=0.0) for group in groups])


@contextmanager
def other_betas() -> Iterator[None]:
    yield from _with_options(lambda _groups, options: options.update(betas=(0.5, 0.5)))


@contextmanager
def stale_weights_after_an_evaluation() -> Iterator[None]:
    """What one evaluation gathered is not given back: the next one computes with it."""
    right, kept = run.evaluate, []

    @torch.no_grad()
    def wrong(trainer: Any, batches: Any) -> Tensor:
        weights = [p.to_local() for part in trainer.parts for p in part.parameters()]
        now = [weight.clone() for weight in weights]
        old = kept.pop() if kept else now
        kept.append(now)
        for weight, value in zip(weights, old, strict=True):
            weight.copy_(value)
        loss = right(trainer, batches)
        for weight, value in zip(weights, now, strict=True):
            weight.copy_(value)
        return loss

    with mock.patch.object(run, "evaluate", wrong):
        yield


@contextmanager
def bias_moves_with_every_microbatch() -> Iterator[None]:
    """Accumulation takes the bias further by its rate for each microbatch."""
    right, right_build = BalanceState.step, BalanceState.__init__

    def build(self: BalanceState, config: Any, *args: Any) -> None:
        right_build(self, config, *args)
        self.rate *= microbatches(config)

    with mock.patch.object(BalanceState, "__init__", build), mock.patch.object(BalanceState, "step", right):
        yield


@contextmanager
def last_microbatch_counted_twice() -> Iterator[None]:
    right = accumulation.split

    def wrong(batch: Any, size: int) -> Any:
        chunks = right(batch, size)
        return [*chunks, chunks[-1]] if torch.is_grad_enabled() else chunks

    with mock.patch.object(accumulation, "split", wrong):
        yield


@contextmanager
def checkpoint_of_another_steps_moment() -> Iterator[None]:
    """What is saved of the second moment is from before the last update."""
    right_step, right_state, before = Optimizers.step, Optimizers.state_dict, {}

    def remember(self: Optimizers) -> None:
        before.update({key: value.clone() for key, value in right_state(self).items() if key.endswith("exp_avg_sq")})
        right_step(self)

    def stale(self: Optimizers) -> dict[str, Any]:
        return right_state(self) | before

    with mock.patch.object(Optimizers, "step", remember), mock.patch.object(Optimizers, "state_dict", stale):
        yield
