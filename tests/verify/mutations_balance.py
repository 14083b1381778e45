"""Known ways to get routing and balancing wrong; see ``mutations.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_dtensor.layers import router
from moe_dtensor.layers.balance import chosen_mask
from moe_dtensor.layers.router import Router
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.train import step


class Scaled:
    """In place of the function that adds auxiliary losses: adds them several times."""

    def __init__(self, factor: float) -> None:
        self.right = router.AddLoss
        self.factor = factor

    def apply(self, gate: Tensor, loss: Tensor) -> Tensor:
        return self.right.apply(gate, loss * self.factor)


@contextmanager
def loss_per_microbatch() -> Iterator[None]:
    """The auxiliary loss is a mean over a microbatch, of which there are four."""
    with mock.patch.object(router, "AddLoss", Scaled(4.0)):
        yield


@contextmanager
def loss_of_every_tp_rank() -> Iterator[None]:
    """Both tp ranks hold all tokens, and each adds their loss to a gradient that is then summed."""
    with mock.patch.object(router, "AddLoss", Scaled(2.0)):
        yield


@contextmanager
def loss_again_when_recomputed() -> Iterator[None]:
    """A loss put aside in the forward pass is put aside once more when its block is recomputed."""
    seen: Counter[float] = Counter()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, loss: Tensor) -> Tensor:
            ctx.loss = float(loss)
            seen[ctx.loss] += 1
            return gate.view_as(gate)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            return gradient, gradient.new_tensor(seen[ctx.loss])

    with mock.patch.object(router, "AddLoss", Again):
        yield


@contextmanager
def bias_by_own_counts() -> Iterator[None]:
    """Each rank moves its biases by the load of its own tokens."""
    right, right_step, own = step.sum_over_ranks, BalanceState.step, []

    def keep(trainer: Any, loss: Tensor, record: Tensor, *others: Any) -> Any:
        own[:] = [record[:, : trainer.config.moe.num_experts].clone()]
        return right(trainer, loss, record, *others)

    def wrong(self: BalanceState, load: Tensor, finite: Tensor) -> Tensor:
        churn = right_step(self, own[0], finite)
        self.previous_load_LE.copy_(load)
        return churn

    with mock.patch.object(step, "sum_over_ranks", keep), mock.patch.object(BalanceState, "step", wrong):
        yield


@contextmanager
def capacity_of_own_tokens() -> Iterator[None]:
    """Each tp rank counts the copies of the tokens that it holds, against a capacity of as many tokens."""
    right = Router.keep

    def wrong(self: Router, gate: Tensor, expert: Tensor) -> Tensor:
        parts = self.gather_tokens(expert)().numel() // expert.numel()
        changes = {
            "gather_tokens": lambda x: lambda: x,
            "own_tokens": _same,
            "takes": -(-(self.takes or 0) // parts),
        }
        with mock.patch.multiple(self, **changes):
            return right(self, gate, expert)

    with mock.patch.object(Router, "keep", wrong):
        yield


@contextmanager
def normalization_detached() -> Iterator[None]:
    """The sum that gates are divided by is taken for a constant."""
    right = router.top_k_gates

    def wrong(*args: Any, normalize: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
        gate, expert = right(*args, **kwargs)
        return (gate / gate.sum(1, keepdim=True).detach() if normalize else gate), expert

    with mock.patch.object(router, "top_k_gates", wrong):
        yield


@contextmanager
def batch_loss_of_the_microbatch() -> Iterator[None]:
    """The balancing loss of the batch takes the microbatch at hand for the batch."""
    right = Router._load_of_sets

    def wrong(self: Router, expert: Tensor) -> Tensor:
        if self.moe.balance_over != "batch":
            return right(self, expert)
        load = chosen_mask(self.gather_tokens(expert)(), self.moe.num_experts).sum((0, 1))
        return load.expand(len(expert), -1)

    with mock.patch.object(Router, "_load_of_sets", wrong):
        yield


@contextmanager
def bias_only_where_it_moves() -> Iterator[None]:
    """A bias that does not move is not looked at."""
    right = Router._limited

    def wrong(self: Router, ranking: Tensor) -> Tensor:
        with mock.patch.object(self, "moe", replace(self.moe, selection_bias=self.moe.bias_rate > 0)):
            return right(self, ranking)

    with mock.patch.object(Router, "_limited", wrong):
        yield


@contextmanager
def bias_in_the_gate() -> Iterator[None]:
    """What only the choice should see is a part of the weight."""
    right = Router._choose

    def wrong(self: Router, logits: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
        gate, expert = right(self, logits, ranking)
        return gate + self.bias.to(gate.dtype)[expert], expert

    with mock.patch.object(Router, "_choose", wrong):
        yield


@contextmanager
def noise_of_the_batch() -> Iterator[None]:
    """Noise by a token's place in what the rank was handed, not by its number in the run."""
    right = Router._noise

    def wrong(self: Router, tokens: Any, width: int) -> Tensor:
        number = torch.arange(tokens.number_BS.numel()).view_as(tokens.number_BS)
        return right(self, tokens._replace(number_BS=number), width)

    with mock.patch.object(Router, "_noise", wrong):
        yield


def _same(x: Tensor) -> Tensor:
    return x
