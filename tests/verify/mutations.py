"""Known ways to get MoE training wrong, each a context manager that breaks the library while it is open.

Ranks are forked inside, so they inherit the broken parts. Those of balancing are in ``mutations_balance.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import Replicate

from moe_dtensor.layers import moe
from moe_dtensor.layers.router import Router
from moe_dtensor.parallel import accumulation, collectives, gradients, tensor
from moe_dtensor.train import optimizer, step


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _gradient_of(pattern: str) -> Iterator[None]:
    """The gradients of some replicated weights are taken as whole where they are shares."""
    right = tensor._gradient_placement

    def wrong(row: Any, config: Any) -> Any:
        return Replicate() if pattern in row.pattern else right(row, config)

    with mock.patch.object(tensor, "_gradient_placement", wrong):
        yield


@contextmanager
def router_not_reduced() -> Iterator[None]:
    yield from _gradient_of("router")


@contextmanager
def norms_not_reduced() -> Iterator[None]:
    yield from _gradient_of("attention_norm")


@contextmanager
def repeated_heads_not_reduced() -> Iterator[None]:
    yield from _gradient_of("w[kv]")


def _experts_scaled(factor: float) -> Iterator[None]:
    right = moe.expert_mlp

    def wrong(x: Tensor, w_up: Tensor, w_down: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return right(x, ScaleGradient.apply(w_up, factor), ScaleGradient.apply(w_down, factor), *args, **kwargs)

    with mock.patch.object(moe, "expert_mlp", wrong):
        yield


@contextmanager
def experts_times_tp() -> Iterator[None]:
    yield from _experts_scaled(2.0)


@contextmanager
def experts_over_tp() -> Iterator[None]:
    yield from _experts_scaled(0.5)


@contextmanager
def norm_counts_replicas() -> Iterator[None]:
    def wrong(parts: Any, *_args: Any) -> Tensor:
        square = sum(p.grad.to_local().square().sum() for part in parts for p in part.parameters())
        dist.all_reduce(square)
        return square.sqrt()

    with mock.patch.object(gradients, "global_norm", wrong):
        yield


@contextmanager
def norm_of_own_stage() -> Iterator[None]:
    right = gradients.global_norm

    def wrong(*args: Any) -> Tensor:
        with mock.patch.object(dist, "all_reduce"):
            return right(*args)

    with mock.patch.object(gradients, "global_norm", wrong):
        yield


@contextmanager
def router_term_per_microbatch() -> Iterator[None]:
    """What reaches the router alone, as an auxiliary loss does, is counted once for each of four microbatches."""
    right = Router.forward

    def wrong(self: Router, scores: Any, tokens: Any) -> Any:
        routing = right(self, scores, tokens)
        return routing._replace(gate_BSK=ScaleGradient.apply(routing.gate_BSK, 4.0))

    with mock.patch.object(Router, "forward", wrong):
        yield


@contextmanager
def microbatch_dropped() -> Iterator[None]:
    right = accumulation.split
    with mock.patch.object(accumulation, "split", lambda batch, size: right(batch, size)[:-1]):
        yield


@contextmanager
def gates_detached() -> Iterator[None]:
    right = Router.forward

    def wrong(self: Router, scores: Any, tokens: Any) -> Any:
        routing = right(self, scores, tokens)
        return routing._replace(gate_BSK=routing.gate_BSK.detach())

    with mock.patch.object(Router, "forward", wrong):
        yield


@contextmanager
def second_ranks_experts_stale() -> Iterator[None]:
    """The optimizer forgets the experts of the second tp rank."""
    right = step.update

    def wrong(trainer: Any, finite: Tensor) -> None:
        experts = [p for part in trainer.parts for n, p in part.named_parameters() if "experts" in n]
        before = [p.detach().to_local().clone() for p in experts]
        right(trainer, finite)
        if trainer.mesh["tp"].get_local_rank() == 1:
            for p, old in zip(experts, before, strict=True):
                p.detach().to_local().copy_(old)

    with mock.patch.object(step, "update", wrong):
        yield


@contextmanager
def loss_over_own_targets() -> Iterator[None]:
    """Each dp rank divides by its own targets and thinks it is done when it halves that."""
    right = step.count_tokens

    def wrong(trainer: Any, batch: Any) -> Any:
        with mock.patch.object(collectives, "all_reduce", lambda x, _mesh: x * 2):
            return right(trainer, batch)

    with mock.patch.object(step, "count_tokens", wrong):
        yield


@contextmanager
def pipeline_scales_gradients() -> Iterator[None]:
    right = schedules.get_schedule_class

    def wrong(name: str) -> Any:
        cls = right(name)

        class Scaling(cls):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs | {"scale_grads": True})

        return Scaling

    with mock.patch.object(schedules, "get_schedule_class", wrong):
        yield


@contextmanager
def routing_over_own_tokens() -> Iterator[None]:
    """Each tp rank balances the tokens that it holds."""
    right = tensor.install_collectives

    def wrong(part: Any, config: Any, tp: Any) -> None:
        right(part, config, tp)
        for module in part.modules():
            if isinstance(module, Router):
                module.gather_tokens, module.own_tokens = lambda x: lambda: x, lambda x: x

    from moe_dtensor.parallel import apply

    with mock.patch.object(apply, "install_collectives", wrong):
        yield


@contextmanager
def padding_in_the_softmax() -> Iterator[None]:
    """Rows of the head that no id has take part in the loss."""
    right = tensor.cross_entropy

    def wrong(*args: Any, vocab_size: int, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs)

    with mock.patch.object(tensor, "cross_entropy", wrong):
        yield


@contextmanager
def norms_decayed() -> Iterator[None]:
    with mock.patch.object(optimizer, "is_decayed", return_value=True):
        yield


Mutation = Callable[[], Any]
