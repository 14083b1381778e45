"""Sinkhorn normalisation of router logits, in the log domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels


@torch.no_grad()
def sinkhorn(logits_GTE: Tensor, iterations: int) -> Tensor:
    """Balance a score matrix: rows (tokens) sum to 1, columns (experts) to T / E (Sinkhorn & Knopp, 1967).

    Works on logarithms with the maximum subtracted, so no logit overflows, and runs a fixed number of iterations, so
    the host never waits for the device. The columns come last and are exact; the rows are as close as the iterations
    brought them.

    Args:
        logits_GTE: ``(groups, T, E)`` or ``(T, E)``; each group is balanced by itself. No T may be split over ranks.
        iterations: rows-then-columns rounds; 0 returns the logits.

    Returns:
        The logarithm of the balanced matrix, same shape, in ``promote_types(dtype, float32)``. No gradient flows.
    """
    log_GTE = logits_GTE.to(torch.promote_types(logits_GTE.dtype, torch.float32))
    tokens, experts = log_GTE.shape[-2:]
    if tokens == 0:
        return log_GTE
    log_share = math.log(tokens / experts)
    if iterations > 0 and log_GTE.dtype == torch.float32 and launches_triton(log_GTE):
        return _sinkhorn_op(log_GTE.reshape(-1, tokens, experts), iterations, log_share).view(log_GTE.shape)
    for _ in range(iterations):
        log_GTE = log_GTE - log_GTE.logsumexp(-1, keepdim=True)
        log_GTE = log_GTE - (log_GTE.logsumexp(-2, keepdim=True) - log_share)
    return log_GTE


def _sinkhorn(logits_GTE: Tensor, iterations: int, log_share: float) -> Tensor:
    return triton_kernels("sinkhorn").sinkhorn(logits_GTE.contiguous(), iterations, log_share)


_sinkhorn_op = define(
    "sinkhorn(Tensor logits, int iterations, float log_share) -> Tensor",
    _sinkhorn,
    lambda logits_GTE, iterations, log_share: torch.empty_like(logits_GTE, memory_format=torch.contiguous_format),
)
