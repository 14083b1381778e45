"""Ranks lend their hottest experts to each other, so that uneven routing is even work.

Every rank of the axis that shares the experts has all choices at hand. So in each layer and microbatch every rank
finds, alike and on its device, which ranks have more copies than the mean, and how many of which experts go where. The
weights of the S hottest experts of each rank are gathered, in shapes that never change; their gradients are summed
where the experts live.

After least-loaded expert parallelism (arXiv:2601.17111), which moves weights as the host finds it, and MoonEP and ECHO
(github.com/MoonshotAI/MoonEP, NVIDIA/Megatron-LM pull request 2368), which find it on the device.

T tokens of all ranks, K choices, E experts, R ranks, H = E / R experts of a rank, S lent of those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import lent_experts
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.experts.sort import sort_by_expert
from moe_dtensor.layers.moe import Experts
from moe_dtensor.mesh import expert_axis
from moe_dtensor.parallel.collectives import Collective, describe, finish, start


class Division(NamedTuple):
    """What one rank computes."""

    lent_S: Tensor
    """Which of its own experts (0 to H - 1) it lends, the hottest first."""
    first_E: Tensor
    """Of each expert's copies, in the order of the tokens, the first that this rank computes."""
    end_E: Tensor
    """And the one after the last. The same as ``first_E`` where it computes none."""
    slot_E: Tensor
    """Where this rank holds the expert: 0 to H - 1 its own, then S lent by rank 0, S by rank 1 and so on. Without a
    meaning where it computes none."""


def divide(count_E: Tensor, ranks: int, lent: int, rank: int) -> Division:
    """Divide copies among ranks, evenly as far as S experts of each rank allow.

    A rank above the mean gives up copies of its hottest expert, then of its second, until it is at the mean. These
    copies, one expert after the other, fill the ranks below the mean, one rank after the other. With S = H all ranks
    end at the mean.

    Args:
        count_E: copies by expert, int64; the same on every rank.
        ranks: R.
        lent: S, at most H.
        rank: whose part is asked for.
    """
    count_RH = count_E.view(ranks, -1)
    held = count_RH.shape[1]
    load_R = count_RH.sum(1)
    mean = (load_R.sum() + ranks - 1) // ranks
    excess_R, room_R = (load_R - mean).clamp(min=0), (mean - load_R).clamp(min=0)

    # How many of the same rank's experts are hotter, and how many copies those have: of equal ones the first is hotter.
    id_H = torch.arange(held, device=count_E.device)
    key_RH = count_RH * held - id_H
    hotter_RHH = key_RH[:, None, :] > key_RH[:, :, None]
    place_RH = hotter_RHH.sum(2)
    before_RH = (hotter_RHH * count_RH[:, None, :]).sum(2)
    moved_RH = (excess_R[:, None] - before_RH).clamp(min=0).minimum(count_RH) * (place_RH < lent)

    # Moved copies are numbered through; each rank with room takes the next so many.
    id_E = torch.arange(len(count_E), device=count_E.device)
    moved_E, own_E = moved_RH.flatten(), id_E // held == rank
    stay_E, after_E, room_end_R = count_E - moved_E, moved_E.cumsum(0), room_R.cumsum(0)
    before_E = after_E - moved_E
    taken, taken_end = room_end_R[rank] - room_R[rank], room_end_R[rank]
    first_E = (stay_E + before_E.clamp(taken, taken_end) - before_E).where(~own_E, 0)
    end_E = (stay_E + after_E.clamp(taken, taken_end) - before_E).where(~own_E, stay_E)
    slot_E = (held + id_E // held * lent + place_RH.flatten()).where(~own_E, id_E % held)
    lent_S = ((place_RH[rank] == id_H[:lent, None]) * id_H).sum(1)
    return Division(lent_S, first_E, end_E, slot_E)


def slots_of_copies(expert_TK: Tensor, num_experts: int, ranks: int, lent: int, rank: int) -> tuple[Tensor, Tensor]:
    """Which of the weights at hand on ``rank`` each copy is computed with, ``(T, K)`` int64, -1 for those that other
    ranks compute (an id of -1 is no copy); and which experts this rank lends, ``(S,)``. No read by the host."""
    # Copies in the order of experts, then tokens: where each lies, and where each expert's end.
    position_TK, _, ends_E = sort_by_expert(expert_TK, 0, num_experts)
    ends_E = ends_E.long()
    begin_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    lent_S, first_E, end_E, slot_E = divide(ends_E - begin_E, ranks, lent, rank)
    held_TK = expert_TK.clamp(min=0)
    here_TK = (position_TK >= (begin_E + first_E)[held_TK]) & (position_TK < (begin_E + end_E)[held_TK])
    return slot_E[held_TK].where(here_TK, -1), lent_S


class Lending:
    """Gather the hottest experts' weights and divide the copies of all ranks' tokens.

    Args:
        axis: the ranks that share the experts, as one mesh axis.
        lent: S.
        reduce_dtype: in which gradients are summed; the master weight's dtype where that is wider.
    """

    def __init__(self, axis: DeviceMesh, lent: int, reduce_dtype: torch.dtype) -> None:
        self.axis = axis
        self.lent = lent
        self.reduce_dtype = reduce_dtype
        self.gather = describe(axis, "all_gather", "reduce_scatter")

    def __call__(self, experts: Experts, expert_TK: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Divide the copies and gather the weights: what gives this rank's part of the sums, ``(T, D)``, of vectors and
        gates."""
        ranks, rank = self.axis.size(), self.axis.get_local_rank()
        slot_TK, lent_S = slots_of_copies(expert_TK, experts.num_experts, ranks, self.lent, rank)
        weights = {}
        for name in experts.weight_names():
            master, cast = experts.local_weight(name), getattr(experts, f"{name}_copy", None)
            wide = torch.promote_types(self.reduce_dtype, master.dtype)
            weights[name] = _WithLent.apply(master, cast, lent_S, self.gather, wide)
        (tokens, choices), held = slot_TK.shape, experts.num_experts // ranks
        rows = most_copies(tokens, choices, ranks, held, self.lent) if experts.rows == "worst" else None
        return lambda x_TD, gate_TK: experts(x_TD, gate_TK, slot_TK, rows, weights)


def most_copies(tokens: int, choices: int, ranks: int, held: int, lent: int) -> int:
    """Copies that a rank computes at most: the mean, or what it has left of as many as could come when it has given
    away those of its S hottest experts, which have at least the share S / H of them."""
    left = -(-tokens * min(choices, held) * (held - lent) // held)
    return max(left, -(-tokens * choices // ranks))


def build_lending(config: Config, mesh: DeviceMesh) -> Lending | None:
    """As ``mesh.lent_experts`` says; None: no expert is lent."""
    lent = lent_experts(config)
    if lent == 0:
        return None
    return Lending(expert_axis(config, mesh), lent, getattr(torch, config.training.reduce_dtype))


class _WithLent(Function):
    """A rank's own experts' weights, then those that all ranks lend.

    One node, so that the sum for the lent experts is added to their rows of the own gradient, without a second gradient
    of the whole weight.
    """

    @staticmethod
    def forward(ctx, master, cast, lent_S, gather: Collective, wide):
        """``cast``: the weight in the dtype of the computation, if that is another."""
        own = master if cast is None else cast
        ctx.save_for_backward(lent_S)
        ctx.gather, ctx.wide, ctx.dtype = gather, wide, master.dtype
        lent = start(own[lent_S], gather.forward, gather)
        return torch.cat([own, finish(lent, gather.forward)])

    @staticmethod
    def backward(ctx, grad):
        (lent_S,) = ctx.saved_tensors
        gather, held = ctx.gather, len(grad) - ctx.gather.ranks * len(lent_S)
        home = start(grad[held:].to(ctx.wide), gather.backward, gather)
        own = grad[:held].to(ctx.wide, copy=True)
        return own.index_add_(0, lent_S, finish(home, gather.backward)).to(ctx.dtype), None, None, None, None
