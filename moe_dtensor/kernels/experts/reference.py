"""The expert MLP as a plain loop over experts: what every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.kernels.experts.activation import activate


def expert_mlp(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    expert_TK: Tensor,
    *,
    activation: str,
    first_expert: int = 0,
    rows: str | int = "exact",
    num_experts: int | None = None,
    split_backward: bool = False,
    up_bias_EGF: Tensor | None = None,
) -> Tensor:
    """See :func:`moe_dtensor.kernels.experts.mlp.expert_mlp`. Any device and dtype; ``rows``, ``num_experts`` and
    ``split_backward`` change nothing."""
    tokens, choices = expert_TK.shape
    width, experts = x_TD.shape[1], w_up_EGFD.shape[0]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    local_TK = expert_TK - first_expert
    held_TK = (local_TK >= 0) & (local_TK < experts)
    # unbind, not indexing: its backward stacks the gradients, where E selects would make E full-size zero tensors.
    weights = zip(w_up_EGFD.unbind(), w_down_EDF.unbind(), strict=True)
    biases = [None] * experts if up_bias_EGF is None else up_bias_EGF.unbind()
    where, copies = [], []
    # Experts without tokens go through as well, so that their weights get zeros for a gradient and not None.
    for expert, ((w_up_GFD, w_down_DF), up_bias_GF) in enumerate(zip(weights, biases, strict=True)):
        where.append((local_TK.flatten() == expert).nonzero().flatten())
        h_nGF = (x_TD[where[-1] // choices] @ w_up_GFD.flatten(0, 1).T).unflatten(1, w_up_GFD.shape[:2])
        h_nGF = h_nGF if up_bias_GF is None else h_nGF + up_bias_GF
        copies.append(activate(h_nGF, activation) @ w_down_DF.T)
    assert experts == len(copies)
    y_ND = x_TD.new_zeros(tokens * choices, width).index_copy(0, torch.cat(where), torch.cat(copies))
    gate_TK = gate_TK.to(wide).where(held_TK, 0)
    y_TKD = y_ND.view(tokens, choices, width).to(wide) * gate_TK.unsqueeze(-1)
    return y_TKD.sum(1).to(x_TD.dtype)
