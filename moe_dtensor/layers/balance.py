"""What evens out or limits the experts' load.

What scatters into a tensor that other code then reads is an operator: the compiler of torch 2.13, on CPUs at least, may
put a reader before the scatter, and did where a capacity, a bias and a balancing loss met.

B sequences, S positions, E experts, K choices, G routing groups, T tokens of a group, N = T K copies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.library import define
from moe_dtensor.layers.assignment import round_to_ties, score


def _chosen_mask(expert: Tensor, experts: int) -> Tensor:
    mask = expert.new_zeros(*expert.shape[:-1], experts + 1, dtype=torch.bool)
    return mask.scatter_(-1, expert.where(expert >= 0, experts), True)[..., :experts]


chosen_mask = define(
    "chosen_mask(Tensor expert, SymInt experts) -> Tensor",
    _chosen_mask,
    lambda expert, experts: expert.new_empty(*expert.shape[:-1], experts + 1, dtype=torch.bool)[..., :experts],
)
"""Ids ``(..., K)``, different ones, as a mask ``(..., E)``; ids of -1 are none."""


def balance_loss(logits_BSE: Tensor, load_BE: Tensor, score_name: str) -> Tensor:
    """``E * sum_e f_e P_te`` summed over tokens: Switch Transformer's loss (arXiv:2101.03961, eq. 4), once the sum is
    divided by the number of tokens.

    Args:
        logits_BSE: differentiable.
        load_BE: copies by expert in the set that a sequence belongs to; f is their share. All zero: even.
        score_name: P is ``softmax`` of the logits, or ``sigmoid`` of them divided by its sum (DeepSeek-V3, eq. 19).
    """
    experts = logits_BSE.shape[-1]
    p_BSE = score(logits_BSE, score_name)
    if score_name == "sigmoid":
        p_BSE = p_BSE / p_BSE.sum(-1, keepdim=True)
    load_BE = load_BE.to(p_BSE.dtype)
    total_B1 = load_BE.sum(-1, keepdim=True)
    f_BE = torch.where(total_B1 > 0, load_BE / total_B1.clamp(min=1), 1 / experts)
    return experts * torch.einsum("bse,be->", p_BSE, f_BE)


def z_loss(logits_BSE: Tensor) -> Tensor:
    """``logsumexp(logits)^2`` summed over tokens (ST-MoE, arXiv:2202.08906, eq. 5, times the number of tokens)."""
    return logits_BSE.logsumexp(-1).square().sum()


class AddLoss(Function):
    """The identity on ``x``; in the backward pass ``loss``, a scalar, is part of what is minimised.

    So a block's loss joins the gradient wherever in a pipeline the block is, once for each time its forward is
    differentiated, and the reported cross-entropy never contains it.
    """

    @staticmethod
    def forward(ctx, x, loss):
        """``x``."""
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        """That of ``x``, and 1."""
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)


def keep_groups(ranking: Tensor, groups: int, kept: int, score: str = "top2") -> Tensor:
    """-inf for experts outside the groups that score highest.

    Args:
        ranking: ``(..., E)``, finite.
        groups: of E / groups consecutive experts.
        kept: groups that stay.
        score: of a group, ``top2``: the sum of its two highest (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); ``max``:
            its highest (DeepSeek-V2, arXiv:2405.04434, section 2.2.2).
    """
    by_group = ranking.unflatten(-1, (groups, -1))
    best = by_group.topk(min(2 if score == "top2" else 1, by_group.shape[-1]), dim=-1).values.sum(-1)
    chosen = best.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return by_group.where(chosen_mask(chosen, groups)[..., None], -torch.inf).flatten(-2)


def _within_capacity(gate_GTK: Tensor, expert_GTK: Tensor, experts: int, most: int, by: str) -> Tensor:
    groups, tokens, choices = expert_GTK.shape
    if by == "position":
        expert_GN = expert_GTK.transpose(1, 2).flatten(1)
        return _first(expert_GN, experts, most).view(groups, choices, tokens).transpose(1, 2).contiguous()
    order_GN = round_to_ties(gate_GTK.flatten(1)).sort(dim=1, descending=True, stable=True).indices
    first_GN = _first(expert_GTK.flatten(1).gather(1, order_GN), experts, most)
    return torch.empty_like(first_GN).scatter_(1, order_GN, first_GN).view(groups, tokens, choices)


within_capacity = define(
    "within_capacity(Tensor gate, Tensor expert, SymInt experts, SymInt most, str by) -> Tensor",
    _within_capacity,
    lambda gate_GTK, expert_GTK, experts, most, by: expert_GTK.new_empty(expert_GTK.shape, dtype=torch.bool),
)
"""Which copies an expert takes when it takes at most ``most`` of each group, ``(G, T, K)`` bool. ``by`` score:
those with the highest gates, of equal ones the earlier token's; position: first choices before second ones, and among
them the earlier tokens (GShard, arXiv:2006.16668, algorithm 1)."""


def _first(expert_GN: Tensor, experts: int, most: int) -> Tensor:
    """Whether a copy is among its expert's first ``most``, in the order given."""
    sorted_GN, copy_GN = expert_GN.sort(dim=1, stable=True)
    ids_GE = torch.arange(experts, device=expert_GN.device).expand(len(expert_GN), experts).contiguous()
    start_GE = torch.searchsorted(sorted_GN, ids_GE)
    # Ids of -1 come first; where they count from does not matter.
    place_GN = torch.arange(expert_GN.shape[1], device=expert_GN.device) - start_GE.gather(1, sorted_GN.clamp(min=0))
    return torch.empty_like(place_GN, dtype=torch.bool).scatter_(1, copy_GN, place_GN < most)
