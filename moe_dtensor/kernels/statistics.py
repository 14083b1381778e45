"""What a router's logits tell of it, summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def router_statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    """``(4,)`` sums over tokens, without gradient: entropy of the softmax in nats, highest minus second highest
    probability, 2-norm of the gates, ``logsumexp(logits)^2``."""
    lse_T1 = logits_TE.logsumexp(1, keepdim=True)
    p_TE = (logits_TE - lse_T1).exp()
    entropy = -(p_TE * (logits_TE - lse_T1)).sum()
    best_TC = p_TE.topk(min(2, p_TE.shape[1]), 1).values
    margin = best_TC[:, 0].sum() - best_TC[:, 1:].sum()
    return torch.stack([entropy, margin, gate_TK.norm(dim=1).sum(), lse_T1.square().sum()])
