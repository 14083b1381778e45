"""What routing tells of itself: a vector of sums over tokens, which add up over microbatches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = {
    "router_entropy": "entropy of the softmax of a token's logits, nats",
    "router_margin": "its highest minus its second highest probability",
    "router_gate_norm": "2-norm of a token's gates",
    "router_z": "square of the logsumexp of its logits (the z-loss without its coefficient)",
    "balance_loss": "load-balancing loss without its coefficient; 0 where it is off",
    "dropped": "copies beyond the capacity, as a share of all copies",
    "differs_from_top_k": "share of tokens whose experts are not those of plain top-k, as in evaluation",
    "sinkhorn_error": "how far a token's row of Sinkhorn's matrix is from its sum of 1",
}
"""Means over the tokens of a step, by the name they have in the metrics."""


class RoutingRecord(NamedTuple):
    """A step's record of all MoE blocks, over all ranks. L MoE blocks, E experts."""

    load_LE: Tensor
    """Copies sent to each expert, float64; exact, and before any is dropped."""
    mean_L: dict[str, Tensor]
    """Of each of :data:`STATISTICS`, ``(L,)`` float64."""


def pack(load_E: Tensor, statistics_4: Tensor, sums: dict[str, Tensor | None]) -> Tensor:
    """One vector ``(E + len(STATISTICS),)`` float64 of a microbatch's load and sums.

    Args:
        load_E: copies by expert.
        statistics_4: the first four of :data:`STATISTICS`, as
            :func:`moe_dtensor.kernels.router.router_statistics` gives them.
        sums: others by name; what is missing or None is 0.
    """
    names, experts = list(STATISTICS), len(load_E)
    record_R = load_E.new_zeros(experts + len(names), dtype=torch.float64)
    record_R[:experts] = load_E
    record_R[experts : experts + 4] = statistics_4
    for name, value in sums.items():
        if value is not None:
            record_R[experts + names.index(name)] = value.detach()
    return record_R


def unpack(record_LR: Tensor, tokens: int, top_k: int | Tensor) -> RoutingRecord:
    """Sums over a whole step of ``tokens`` tokens, as means; K of all blocks, or of each ``(L,)``."""
    experts = record_LR.shape[1] - len(STATISTICS)
    means = dict(zip(STATISTICS, (record_LR[:, experts:] / tokens).unbind(1), strict=True))
    means["dropped"] = means["dropped"] / top_k
    return RoutingRecord(record_LR[:, :experts], means)
