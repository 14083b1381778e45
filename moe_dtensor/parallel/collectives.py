"""The collectives that a forward pass needs over one mesh axis, each with its exact gradient.

Each ``start_…`` begins one and returns the function that waits for it: what is computed in between runs beside it (on a
GPU), and in the backward pass the same lies beside the gradient's way back. The gradient of what every rank computes
alike is alike on every rank; of what each rank computes a share of, it is a share. On an axis of size 1 each is the
identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Coming = Callable[[], Tensor]
"""Waits for what is under way, and returns it. To be called once."""
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "own_part", "nothing"]


class Way(NamedTuple):
    """A collective along the first dimension, and the one that takes its gradient back."""

    there: Kind
    back: Kind
    group: str
    """Name of the process group."""
    ranks: int
    rank: int
    """This one's number in the group."""
    sent: Sequence[int] = ()
    """Of an all-to-all: rows for each rank."""
    received: Sequence[int] = ()
    """And rows from each."""


def start_gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Coming:
    """All-gather along ``dim``; each rank then uses the whole for a share of the work. Backward: reduce-scatter."""
    return _gather(x, mesh, dim, "reduce_scatter")


def gather_alike(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along ``dim``; every rank then computes the same. Backward: each rank takes its own slice."""
    return start_gather_alike(x, mesh, dim)()


def start_gather_alike(x: Tensor, mesh: DeviceMesh, dim: int) -> Coming:
    """Begin to :func:`gather_alike`."""
    return _gather(x, mesh, dim, "own_part")


def start_copy(x: Tensor, mesh: DeviceMesh) -> Coming:
    """The identity for what every rank holds and uses for a share of the work. Backward: all-reduce."""
    return _start(x, mesh, "nothing", "all_reduce")


def start_reduce(x: Tensor, mesh: DeviceMesh) -> Coming:
    """Sum the ranks' shares; every rank then computes the same. Backward: the identity."""
    return _start(x, mesh, "all_reduce", "nothing")


def reduce_shares(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum the ranks' shares; each rank uses the sum for a share of the work. Backward: all-reduce."""
    return _start(x, mesh, "all_reduce", "all_reduce")()


def start_reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Coming:
    """Sum the ranks' shares and keep one slice of ``dim`` each. Backward: all-gather."""
    return _start(parts_of(x, mesh.size(), dim), mesh, "reduce_scatter", "all_gather")


def share(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's slice of what every rank holds alike, for work that no other rank does. Backward: all-gather."""
    return _start(parts_of(x, mesh.size(), dim), mesh, "own_part", "all_gather")()


def exchange(x: Tensor, mesh: DeviceMesh, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """All-to-all of rows, sorted by receiver in and by sender out. Backward: the way back.

    Args:
        sent: rows for each rank of the axis.
        received: rows from each.
    """
    return start_exchange(x, mesh, sent, received)()


def start_exchange(x: Tensor, mesh: DeviceMesh, sent: Sequence[int], received: Sequence[int]) -> Coming:
    """Begin to :func:`exchange`."""
    return _start(x, mesh, "all_to_all", "all_to_all", sent, received)


def own_slice(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
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


def exchange_counts(received: Tensor, sent: Tensor, mesh: DeviceMesh) -> None:
    """Row r of ``sent`` to rank r; from each rank a row into ``received``."""
    dist.all_to_all_single(received, sent.contiguous(), group=mesh.get_group())


def _gather(x: Tensor, mesh: DeviceMesh, dim: int, back: Kind) -> Coming:
    coming, ranks = _start(x, mesh, "all_gather", back), mesh.size()
    if dim == 0 or ranks == 1:
        return coming
    return lambda: parts_to(coming(), ranks, dim)


def parts_to(x: Tensor, ranks: int, dim: int) -> Tensor:
    """Ranks' parts, one after the other along the first dimension, as slices of ``dim`` of a whole."""
    return x if dim == 0 or ranks == 1 else x.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1)


def parts_of(x: Tensor, ranks: int, dim: int) -> Tensor:
    """The other way round."""
    return x if dim == 0 or ranks == 1 else x.unflatten(dim, (ranks, -1)).movedim(dim, 0).flatten(0, 1)


def _start(
    x: Tensor, mesh: DeviceMesh, there: Kind, back: Kind, sent: Sequence[int] = (), received: Sequence[int] = ()
) -> Coming:
    if mesh.size() == 1:
        return lambda: x
    way = Way(there, back, mesh.get_group().group_name, mesh.size(), mesh.get_local_rank(), sent, received)
    coming, gradient = _Start.apply(x, way)
    return lambda: _Finish.apply(coming, gradient, way)


class _Start(torch.autograd.Function):
    """Gives what is under way, and what stands, without storage, for ``x``: the way back begins with its gradient."""

    @staticmethod
    def forward(ctx, x, way):
        ctx.set_materialize_grads(False)
        ctx.kind = way.back
        return _begin(x, way.there, way), x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, _, grad):
        return _end(grad, ctx.kind), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coming, gradient, way):
        ctx.way = way
        return _end(coming, way.there)

    @staticmethod
    def backward(ctx, grad):
        way = ctx.way
        return None, _begin(grad, way.back, way._replace(sent=way.received, received=way.sent)), None


def _begin(x: Tensor, kind: Kind, way: Way) -> Tensor:
    begun = _call(x.contiguous(), kind, way)
    # Two of gloo's all-gathers at a time on one group corrupt its heap (torch 2.13): on CPUs each ends where it begins.
    return _end(begun, kind) if x.device.type == "cpu" else begun


def _call(x: Tensor, kind: Kind, way: Way) -> Tensor:
    collectives = torch.ops._c10d_functional
    if kind == "all_gather":
        return collectives.all_gather_into_tensor(x, way.ranks, way.group)
    if kind == "reduce_scatter":
        return collectives.reduce_scatter_tensor(x, "sum", way.ranks, way.group)
    if kind == "all_reduce":
        return collectives.all_reduce(x, "sum", way.group)
    if kind == "all_to_all":
        return collectives.all_to_all_single(x, way.received, way.sent, way.group)
    return x.chunk(way.ranks)[way.rank] if kind == "own_part" else x.view_as(x)


def _end(x: Tensor, kind: Kind) -> Tensor:
    x = x.view_as(x)
    return x if kind in ("own_part", "nothing") else torch.ops._c10d_functional.wait_tensor(x)
