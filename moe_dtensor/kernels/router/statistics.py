"""What a router's scores look like, as sums over tokens: for metrics, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels

STATISTICS = ("entropy", "margin", "gate_norm", "squared_logsumexp")
"""What :func:`router_statistics` sums up, in this order."""


@torch.no_grad()
def router_statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    """Sums over tokens of four statistics of the router, in a fixed order of summation and without a host sync.

    Divided by T (summed over ranks first), they are means over tokens; that of the squared logsumexp is the z-loss
    without its coefficient (Zoph et al., arXiv:2202.08906).

    Args:
        logits_TE: the router's output ``(T, E)``; T may be 0.
        gate_TK: weights of the chosen experts ``(T, K)``, 0 for choices without a copy; any floating dtype.

    Returns:
        ``(4,)`` in ``promote_types(logits.dtype, float32)``, without gradient: the entropy of ``softmax(logits)`` in
        nats; its largest less its second largest probability (1 when E = 1); the 2-norm of a token's gates; and
        ``logsumexp(logits)^2``.
    """
    return _statistics_op(logits_TE.detach(), gate_TK.detach())


def _statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    if launches_triton(logits_TE) and wide == torch.float32 and logits_TE.numel() > 0:
        return triton_kernels("router.statistics").router_statistics(logits_TE.contiguous(), gate_TK.contiguous())
    logits_TE, gate_TK = logits_TE.to(wide), gate_TK.to(wide)
    logsumexp_T = logits_TE.logsumexp(1)
    probability_TE = logits_TE.softmax(1)
    entropy_T = torch.special.entr(probability_TE).sum(1)
    highest = probability_TE.topk(min(2, logits_TE.shape[1]), 1).values
    margin_T = highest[:, 0] - (highest[:, 1] if highest.shape[1] == 2 else 0)
    return torch.stack([entropy_T.sum(), margin_T.sum(), gate_TK.norm(dim=1).sum(), logsumexp_T.square().sum()])


_statistics_op = define(
    "router_statistics(Tensor logits, Tensor gate) -> Tensor",
    _statistics,
    lambda logits_TE, gate_TK: logits_TE.new_empty(4, dtype=torch.promote_types(logits_TE.dtype, torch.float32)),
)
