"""The collectives that a forward pass needs over one mesh axis, each with its exact gradient.

All are DTensor redistributions of plain tensors. The gradient of what every rank computes alike is alike
on every rank (Replicate); of what each rank computes a share of, it is a share (Partial). On an axis
of size 1 each is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def _move(x: Tensor, mesh: DeviceMesh, source: Placement, target: Placement, gradient: Placement) -> Tensor:
    if mesh.size() == 1:
        return x
    whole = DTensor.from_local(x, mesh, [source], run_check=False)
    return whole.redistribute(placements=[target]).to_local(grad_placements=[gradient])


def gather(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along ``dim``; each rank then uses the whole for a share of the work. Backward: reduce-scatter."""
    return _move(x, mesh, Shard(dim), Replicate(), Partial())


def gather_alike(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along ``dim``; every rank then computes the same. Backward: each rank takes its own slice."""
    return _move(x, mesh, Shard(dim), Replicate(), Replicate())


def copy(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The identity for what every rank holds and uses for a share of the work. Backward: all-reduce."""
    return _move(x, mesh, Replicate(), Replicate(), Partial())


def reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum the ranks' shares; every rank then computes the same. Backward: the identity."""
    return _move(x, mesh, Partial(), Replicate(), Replicate())


def reduce_shares(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum the ranks' shares; each rank uses the sum for a share of the work. Backward: all-reduce."""
    return _move(x, mesh, Partial(), Replicate(), Partial())


def reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Sum the ranks' shares and keep one slice of ``dim`` each. Backward: all-gather."""
    return _move(x, mesh, Partial(), Shard(dim), Shard(dim))


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


def share(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's slice of what every rank holds alike, for work that no other rank does. Backward: all-gather."""
    return _move(x, mesh, Replicate(), Shard(dim), Shard(dim))


class Travelling(NamedTuple):
    """Rows that an all-to-all has not yet brought. Whatever is computed before they are waited for runs beside it."""

    rows: Tensor
    back: Tensor
    """Stands, without storage, for what is sent: the way back begins with its gradient."""
    mesh: DeviceMesh
    sent: list[int]
    received: list[int]


def start_exchange(x: Tensor, mesh: DeviceMesh, sent: list[int], received: list[int]) -> Travelling:
    """Begin an all-to-all of rows, sorted by receiver in and by sender out. Backward: end of the way back.

    Args:
        sent: rows for each rank of the axis.
        received: rows from each.
    """
    rows, back = _StartExchange.apply(x, mesh.get_group().group_name, sent, received)
    return Travelling(rows, back, mesh, sent, received)


def finish_exchange(travelling: Travelling) -> Tensor:
    """Wait for the rows. Backward: begin of the way back."""
    rows, back, mesh, sent, received = travelling
    return _FinishExchange.apply(rows, back, mesh.get_group().group_name, sent, received)


def exchange(x: Tensor, mesh: DeviceMesh, sent: list[int], received: list[int]) -> Tensor:
    """Both at once."""
    return finish_exchange(start_exchange(x, mesh, sent, received))


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, sent, received):
        ctx.set_materialize_grads(False)
        return _all_to_all(x, received, sent, group), x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, _, grad):
        return _wait(grad), None, None, None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, back, group, sent, received):
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _wait(rows)

    @staticmethod
    def backward(ctx, grad):
        return None, _all_to_all(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group)


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x.view_as(x))


def exchange_counts(received: Tensor, sent: Tensor, mesh: DeviceMesh) -> None:
    """Row r of ``sent`` to rank r; from each rank a row into ``received``."""
    dist.all_to_all_single(received, sent.contiguous(), group=mesh.get_group())
