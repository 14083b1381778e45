"""Experts outside of FSDP: dp ranks hold different ones, so there is nothing to gather over dp.

Their master weights are DTensors on the whole (dp, tp) submesh; several dp ranks may hold the same experts. A layer
computes with the local part in ``param_dtype``, cast once a step; gradients add up in ``training.dtype`` and are
summed, once a step, over ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Placement

from moe_dtensor.config.resolve import expert_shards
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.layers.moe import Experts
from moe_dtensor.model.transformer import Transformer

if TYPE_CHECKING:
    from moe_dtensor.parallel.accumulation import Runner

Weights = Iterator[tuple[Experts, str, DTensor]]


def view_copy(module: nn.Module, name: str, gradient: Sequence[Placement]) -> Tensor:
    """The local part of a weight in the dtype of the computation; its gradient flows to the master weight."""
    master = module._parameters[name]
    assert isinstance(master, DTensor)
    local = master.to_local(grad_placements=list(gradient))
    copy = getattr(module, f"{name}_copy", None)
    return local if copy is None else _Use.apply(local, copy)


class _Use(Function):
    """The copy in place of its master; the gradient is the master's, in its dtype."""

    @staticmethod
    def forward(ctx, master, copy):
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def has_own_experts(config: Config) -> bool:
    """Whether experts live on dp ranks and FSDP leaves them alone."""
    return config.mesh.experts in ("dp", "dp_tp") and expert_shards(config) == 1


def make_copies(part: Transformer, config: Config) -> None:
    """Make room for the copies, once the weights are real; none where the dtypes are the same."""
    dtype = getattr(torch, config.training.param_dtype)
    for module, name, weight in _own_weights(part):
        if weight.dtype != dtype:
            copy = torch.empty_like(weight.to_local(), dtype=dtype)
            module.register_buffer(f"{name}_copy", copy, persistent=False)


class WithOwnExperts:
    """A runner around another: casts the weights before it, sums their gradients in ``reduce_dtype`` after it."""

    def __init__(self, parts: list[Transformer], runner: Runner, reduce_dtype: torch.dtype) -> None:
        self.reduce_dtype = reduce_dtype
        self.parts = parts
        self.runner = runner

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward; see :class:`moe_dtensor.parallel.accumulation.Runner`."""
        self._cast()
        loss = self.runner.step(batch, scale)
        for _, _, weight in self._weights():
            if weight.grad is not None:
                assert isinstance(weight.grad, DTensor)
                wide = torch.promote_types(self.reduce_dtype, weight.dtype)
                grad = cast(DTensor, weight.grad.to(wide))
                weight.grad = _sum_over_copies(grad, weight.placements).to(weight.dtype)
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only."""
        self._cast()
        return self.runner.evaluate(batch)

    def close(self) -> None:
        """As the runner inside does it."""
        self.runner.close()

    @torch.no_grad()
    def _cast(self) -> None:
        for module, name, weight in self._weights():
            copy = getattr(module, f"{name}_copy", None)
            if copy is not None:
                copy.copy_(weight.to_local())

    def _weights(self) -> Weights:
        for part in self.parts:
            yield from _own_weights(part)


def _sum_over_copies(grad: DTensor, placements: Sequence[Placement]) -> DTensor:
    """A gradient that ranks hold shares of, summed, one axis after the other: torch warns of two at once."""
    found = list(grad.placements)
    for i, wanted in enumerate(placements):
        if found[i] != wanted:
            found[i] = wanted
            grad = grad.redistribute(placements=found)
    return grad


def _own_weights(part: Transformer) -> Weights:
    for module in part.modules():
        if isinstance(module, Experts):
            for name, weight in module.named_parameters(recurse=False):
                assert isinstance(weight, DTensor)
                yield module, name, weight
