"""Each collective's gradient is the adjoint of what it computes, on ranks that use it as documented."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_dtensor.parallel import collectives
from moe_dtensor.testing.ranks import run_on_ranks

RANKS = 3


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _share_of_work(rank: int, x: Tensor) -> Tensor:
    """What one rank computes of the whole: differs by rank, and all shares together matter."""
    return (x * _numbers(100 + rank, *x.shape)).square()


def _on_rank() -> dict[str, tuple[Tensor, Tensor]]:
    mesh = init_device_mesh("cpu", (RANKS,))
    rank = mesh.get_local_rank()
    part, whole = _numbers(rank, 2, 2).requires_grad_(), _numbers(7, 2, 6).requires_grad_()
    results = {}

    def record(name: str, leaf: Tensor, loss: Tensor) -> None:
        loss.backward()
        results[name] = (loss.detach(), leaf.grad.clone())
        leaf.grad = None

    def total(share: Tensor) -> Tensor:
        return collectives.start_all_reduce(share, mesh)().sum()

    # A share of the work, then the sum of all ranks' shares: the loss is the same on every rank.
    record("gather, reduce", part, total(_share_of_work(rank, collectives.start_all_gather(part, mesh, 1)())))
    record("weight, reduce", part, total(_share_of_work(rank, collectives.gather_weight(part, mesh, 1, part.dtype))))
    record("copy, reduce", whole, total(_share_of_work(rank, collectives.start_copy(whole, mesh)())))
    shares = _share_of_work(rank, collectives.start_copy(whole, mesh)())
    scattered = collectives.start_reduce_scatter(shares, mesh, 1)()
    record("copy, reduce_scatter", whole, collectives.gather_replicated(scattered, mesh, 1).square().sum())
    record("gather_replicated", part, collectives.gather_replicated(part, mesh, 1).pow(3).sum())
    of_all = collectives.all_reduce_partials(part.sum(), mesh)
    record("all_reduce_partials", part, total(_share_of_work(rank, of_all * part)))
    return results


def _by_hand(name: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and each rank's gradient from one process that holds everything."""
    parts = [_numbers(rank, 2, 2).requires_grad_() for rank in range(RANKS)]
    whole = _numbers(7, 2, 6).requires_grad_()
    if name in ("gather, reduce", "weight, reduce"):
        loss = sum(_share_of_work(rank, torch.cat(parts, 1)) for rank in range(RANKS)).sum()
    elif name == "copy, reduce":
        loss = sum(_share_of_work(rank, whole) for rank in range(RANKS)).sum()
    elif name == "copy, reduce_scatter":
        loss = sum(_share_of_work(rank, whole) for rank in range(RANKS)).square().sum()
    elif name == "gather_replicated":
        loss = torch.cat(parts, 1).pow(3).sum()
    else:
        total = sum(part.sum() for part in parts)
        loss = sum(_share_of_work(rank, total * part) for rank, part in enumerate(parts)).sum()
    loss.backward()
    return loss.detach(), [whole.grad] * RANKS if whole.grad is not None else [part.grad for part in parts]


def _sum_of_small_parts() -> Tensor:
    mesh = init_device_mesh("cpu", (4,))
    weight = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    whole = collectives.gather_weight(weight, mesh, 0, torch.float32)
    # 256 and three times 1: in bfloat16, one after the other, the ones are lost.
    (whole * (256.0 if mesh.get_local_rank() == 0 else 1.0)).sum().backward()
    assert weight.grad is not None
    return weight.grad


def test_a_weights_gradient_is_summed_in_the_dtype_that_is_asked_for() -> None:
    for gradient in run_on_ranks(_sum_of_small_parts, 4):
        assert gradient.dtype == torch.bfloat16
        assert gradient.tolist() == [260.0, 260.0]  # 259 has nine digits


def test_every_gradient_is_the_adjoint() -> None:
    ranks = run_on_ranks(_on_rank, RANKS)
    assert len(ranks[0]) == 6
    for name in ranks[0]:
        loss, gradients = _by_hand(name)
        for rank in range(RANKS):
            torch.testing.assert_close(ranks[rank][name][0], loss, msg=f"{name}: loss")
            torch.testing.assert_close(ranks[rank][name][1], gradients[rank], msg=f"{name}: gradient of rank {rank}")
