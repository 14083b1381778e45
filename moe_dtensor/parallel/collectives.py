"""The collectives that a forward pass needs over one mesh axis, each with its exact gradient.

Each ``start_…`` begins one and returns it pending. What is computed before the wait overlaps it on a GPU, and so does
its counterpart in the backward pass. Where every rank computes the same (replicated work), the gradient is the
same on every rank. Where each rank computes a part of the work, its gradient is a partial sum. On an axis of size 1
each collective is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import tp_axis
from moe_dtensor.config.schema import Config

Pending = Callable[[], Tensor]
"""A pending collective: call it to wait for the result. To be called once."""
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "local_slice", "identity"]


class Collective(NamedTuple):
    """A collective along the first dimension, and the one for its gradient."""

    forward: Kind
    backward: Kind
    group: str
    """Name of the process group."""
    ranks: int
    rank: int
    """This one's number in the group."""
    sent: Sequence[int] = ()
    """Of an all-to-all: rows for each rank."""
    received: Sequence[int] = ()
    """And rows from each."""
    sum_dtype: torch.dtype | None = None
    """In which the backward sums; None: the gradient's."""


def start_all_gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """All-gather along ``dim``; each rank then computes a part of the work. Backward: reduce-scatter."""
    return _gather(x, mesh, dim, "reduce_scatter")


def gather_replicated(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along ``dim``; replicated work follows. Backward: each rank takes its local slice."""
    return start_gather_replicated(x, mesh, dim)()


def start_gather_replicated(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """Begin to :func:`gather_replicated`."""
    return _gather(x, mesh, dim, "local_slice")


def gather_weight(x: Tensor, mesh: DeviceMesh, dim: int, sum_dtype: torch.dtype) -> Tensor:
    """All-gather a weight along ``dim``; each rank uses the whole for a part of the work. Backward: reduce-scatter, in
    ``sum_dtype``."""
    return _gather(x, mesh, dim, "reduce_scatter", sum_dtype)()


def start_copy(x: Tensor, mesh: DeviceMesh) -> Pending:
    """The identity on a replicated tensor, before each rank computes a part of the work. Backward: all-reduce."""
    return _start(x, mesh, "identity", "all_reduce")


def start_all_reduce(x: Tensor, mesh: DeviceMesh) -> Pending:
    """Sum the ranks' partial results; replicated work follows. Backward: the identity."""
    return _start(x, mesh, "all_reduce", "identity")


def all_reduce_partials(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum the ranks' partial results; each rank then computes a part of the work. Backward: all-reduce."""
    return _start(x, mesh, "all_reduce", "all_reduce")()


def start_reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Pending:
    """Sum the ranks' partial results and keep one slice of ``dim`` each. Backward: all-gather."""
    return _start(split_shards(x, mesh.size(), dim), mesh, "reduce_scatter", "all_gather")


def scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's slice of a replicated tensor, for a part of the work. Backward: all-gather."""
    return _start(split_shards(x, mesh.size(), dim), mesh, "local_slice", "all_gather")()


def all_to_all(x: Tensor, mesh: DeviceMesh, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """All-to-all of rows, sorted by receiver in and by sender out. Backward: the reverse all-to-all.

    Args:
        sent: rows for each rank of the axis.
        received: rows from each.
    """
    return start_all_to_all(x, mesh, sent, received)()


def start_all_to_all(x: Tensor, mesh: DeviceMesh, sent: Sequence[int], received: Sequence[int]) -> Pending:
    """Begin :func:`all_to_all`."""
    return _start(x, mesh, "all_to_all", "all_to_all", sent, received)


def local_slice(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's slice of ``dim`` of a tensor that every rank holds whole. For data without gradient."""
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


@torch.no_grad()
def all_reduce(x: Tensor, mesh: DeviceMesh, op: str = "sum") -> Tensor:
    """Combine over the axis by ``sum`` or ``max``, into a new tensor. Without gradient."""
    if mesh.size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=mesh.get_group())
    return x


def all_to_all_counts(received: Tensor, sent: Tensor, mesh: DeviceMesh) -> None:
    """Row r of ``sent`` to rank r; from each rank a row into ``received``."""
    dist.all_to_all_single(received, sent.contiguous(), group=mesh.get_group())


def _gather(x: Tensor, mesh: DeviceMesh, dim: int, backward: Kind, sum_dtype: torch.dtype | None = None) -> Pending:
    pending, ranks = _start(x, mesh, "all_gather", backward, sum_dtype=sum_dtype), mesh.size()
    if dim == 0 or ranks == 1:
        return pending
    return lambda: merge_shards(pending(), ranks, dim)


def merge_shards(x: Tensor, ranks: int, dim: int) -> Tensor:
    """Shards that are stacked along the first dimension, joined along ``dim``."""
    return x if dim == 0 or ranks == 1 else x.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1)


def split_shards(x: Tensor, ranks: int, dim: int) -> Tensor:
    """The inverse of :func:`merge_shards`: cut along ``dim``, stack along the first dimension."""
    return x if dim == 0 or ranks == 1 else x.unflatten(dim, (ranks, -1)).movedim(dim, 0).flatten(0, 1)


def _start(
    x: Tensor,
    mesh: DeviceMesh,
    forward: Kind,
    backward: Kind,
    sent: Sequence[int] = (),
    received: Sequence[int] = (),
    sum_dtype: torch.dtype | None = None,
) -> Pending:
    if mesh.size() == 1:
        return lambda: x
    collective = describe(mesh, forward, backward, sent, received, sum_dtype)
    pending, gradient = _Start.apply(x, collective)
    return lambda: _Wait.apply(pending, gradient, collective)


class _Start(torch.autograd.Function):
    """Gives the pending result, and a stand-in for ``x`` without storage: its gradient is the pending backward."""

    @staticmethod
    def forward(ctx, x, collective):
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.dtype = collective.backward, x.dtype
        stand_in = x.new_empty((), dtype=collective.sum_dtype).expand(x.shape)
        return start(x, collective.forward, collective), stand_in

    @staticmethod
    def backward(ctx, _, grad):
        return finish(grad, ctx.kind).to(ctx.dtype), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pending, gradient, collective):
        ctx.collective = collective
        return finish(pending, collective.forward)

    @staticmethod
    def backward(ctx, grad):
        collective = ctx.collective
        grad = grad if collective.sum_dtype is None else grad.to(collective.sum_dtype)
        return (
            None,
            start(grad, collective.backward, collective._replace(sent=collective.received, received=collective.sent)),
            None,
        )


def describe(
    mesh: DeviceMesh,
    forward: Kind,
    backward: Kind,
    sent: Sequence[int] = (),
    received: Sequence[int] = (),
    sum_dtype: torch.dtype | None = None,
) -> Collective:
    """A collective over a mesh axis."""
    group = mesh.get_group().group_name
    # All at once: where a graph breaks while one is under way, torch 2.11 cannot compile around a `_replace`.
    return Collective(forward, backward, group, mesh.size(), mesh.get_local_rank(), sent, received, sum_dtype)


def start(x: Tensor, kind: Kind, collective: Collective) -> Tensor:
    """Begin a collective without gradient, for autograd functions; :func:`finish` waits for what it gives."""
    started = _call(x.contiguous(), kind, collective)
    # Two of gloo's all-gathers at a time on one group corrupt its heap (torch 2.13): on CPUs each ends where it begins.
    return finish(started, kind) if x.device.type == "cpu" else started


def _call(x: Tensor, kind: Kind, collective: Collective) -> Tensor:
    collectives = torch.ops._c10d_functional
    if kind == "all_gather":
        return collectives.all_gather_into_tensor(x, collective.ranks, collective.group)
    if kind == "reduce_scatter":
        return collectives.reduce_scatter_tensor(x, "sum", collective.ranks, collective.group)
    if kind == "all_reduce":
        return collectives.all_reduce(x, "sum", collective.group)
    if kind == "all_to_all":
        return collectives.all_to_all_single(x, collective.received, collective.sent, collective.group)
    return x.chunk(collective.ranks)[collective.rank] if kind == "local_slice" else x.view_as(x)


def run(x: Tensor, kind: Kind, collective: Collective) -> Tensor:
    """:func:`start` and :func:`finish`."""
    return finish(start(x, kind, collective), kind)


def finish(x: Tensor, kind: Kind) -> Tensor:
    """The result of :func:`start`."""
    x = x.view_as(x)
    return x if kind in ("local_slice", "identity") else torch.ops._c10d_functional.wait_tensor(x)


class Borders:
    """All-gather in and reduce-scatter out, or, where every rank holds all tokens, nothing in and all-reduce out.

    Args:
        axis: one mesh axis.
        dim: dimension of what crosses the border that the axis splits outside of the layer; None: every rank holds it.
    """

    def __init__(self, axis: DeviceMesh, dim: int | None) -> None:
        self.axis = axis
        self.dim = dim

    def enter(self, x: Tensor) -> Pending:
        """Gather all tokens, before each rank computes a part of the work."""
        if self.dim is None:
            return start_copy(x, self.axis)
        return start_all_gather(x, self.axis, self.dim)

    def enter_data(self, x: Tensor) -> Pending:
        """The same without gradient."""
        with torch.no_grad():
            return (lambda: x) if self.dim is None else start_gather_replicated(x, self.axis, self.dim)

    def leave(self, y: Tensor) -> Pending:
        """Sum the partial results, in the layout of the residual stream."""
        if self.dim is None:
            return start_all_reduce(y, self.axis)
        return start_reduce_scatter(y, self.axis, self.dim)

    def enter_before(self, module: nn.Module) -> None:
        """Put the first border before a module whose first argument is the stream."""
        module.register_forward_pre_hook(lambda _module, args: (self.enter(args[0])(), *args[1:]))


def sequence_borders(config: Config, tp: DeviceMesh) -> Borders:
    """Of layers that take whole sequences in order."""
    return Borders(tp, tp_axis(config))


def token_borders(config: Config, tp: DeviceMesh) -> Borders:
    """Of layers that take tokens in any order: the ranks' come one after the other, and nothing is rearranged."""
    return Borders(tp, 0 if config.mesh.sequence_parallel else None)
