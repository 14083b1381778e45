"""What stands between the grouped GEMMs: gather, activation, its gradient, weighted gather-and-sum.

Each operator has clear PyTorch here and a Triton kernel in :mod:`.permute_triton`, which GPUs use. Rows past
``ends_E[-1]`` hold nothing: nobody writes or reads them. P stands for G * F.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.experts.activation import activate, activation_gradient, num_up_projections
from moe_dtensor.kernels.library import define, launches_triton, triton_kernels

# ---- permute: x_TD, position_TK -> (rows, D) --------------------------------------------------------------------


def _permute(x_TD: Tensor, position_TK: Tensor, rows: int, after: Tensor | None = None) -> Tensor:
    out_ND = x_TD.new_empty(rows, x_TD.shape[1])
    if out_ND.numel() == 0:
        return out_ND
    if launches_triton(x_TD):
        triton_kernels("experts.permute").permute(x_TD.contiguous(), position_TK, out_ND)
        return out_ND
    token, choice = (position_TK >= 0).nonzero(as_tuple=True)
    return out_ND.index_copy_(0, position_TK[token, choice].long(), x_TD[token])


permute = define(
    "permute(Tensor x, Tensor position, SymInt rows, Tensor? after=None) -> Tensor",
    _permute,
    lambda x_TD, position_TK, rows, after=None: x_TD.new_empty(rows, x_TD.shape[1]),
)
"""``out[position[t, k]] = x[t]``. Each token is read once and its rows written from registers.

``after`` is not looked at. A gather of the backward pass names a gradient there: else a compiler makes it with the
forward pass, which has all that it needs, and keeps its (N, D) rows alive in between.
"""

# ---- unpermute: y_ND, position_TK, gate_TK -> (T, D) -------------------------------------------------------------


def _unpermute(y_ND: Tensor, position_TK: Tensor, gate_TK: Tensor | None) -> Tensor:
    out_TD = y_ND.new_empty(position_TK.shape[0], y_ND.shape[1])
    if out_TD.numel() == 0:
        return out_TD
    if y_ND.shape[0] == 0:
        return out_TD.zero_()
    if launches_triton(y_ND):
        triton_kernels("experts.permute").unpermute(y_ND.contiguous(), position_TK, gate_TK, out_TD)
        return out_TD
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    held_TK = position_TK >= 0
    y_TKD = y_ND[position_TK.clamp(min=0).long()].to(wide)
    if gate_TK is not None:
        y_TKD = y_TKD * gate_TK.to(wide).unsqueeze(-1)
    # where, not multiply: what a copy held elsewhere points to may be NaN.
    return y_TKD.where(held_TK.unsqueeze(-1), 0).sum(1).to(y_ND.dtype)


unpermute = define(
    "unpermute(Tensor y, Tensor position, Tensor? gate) -> Tensor",
    _unpermute,
    lambda y_ND, position_TK, gate_TK: y_ND.new_empty(position_TK.shape[0], y_ND.shape[1]),
)
"""``out[t] = sum_k gate[t, k] * y[position[t, k]]`` in fp32 and in the order of k; no gate: a plain sum."""

# ---- activate_rows: h_NP, ends_E -> (N, F) --------------------------------------------------------------------------


def _activate_rows(h_NP: Tensor, ends_E: Tensor, activation: str) -> Tensor:
    groups = num_up_projections(activation)
    out_NF = h_NP.new_empty(h_NP.shape[0], h_NP.shape[1] // groups)
    if out_NF.numel() == 0:
        return out_NF
    if launches_triton(h_NP):
        triton_kernels("experts.permute").activate_rows(h_NP, ends_E, out_NF, activation)
        return out_NF
    return activate(h_NP.unflatten(1, (groups, -1)), activation)


activate_rows = define(
    "activate_rows(Tensor h, Tensor ends, str activation) -> Tensor",
    _activate_rows,
    lambda h_NP, ends_E, activation: h_NP.new_empty(h_NP.shape[0], h_NP.shape[1] // num_up_projections(activation)),
)
"""The activation of each row; gate columns come first in ``h_NP``, then up columns."""

# ---- activation_backward --------------------------------------------------------------------------------------------


def _activation_backward(
    h_NP: Tensor, da_NF: Tensor, gate_TK: Tensor, position_TK: Tensor, copy_N: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dh_NP, weighted_NF = torch.empty_like(h_NP), torch.empty_like(da_NF)
    if launches_triton(h_NP) and da_NF.numel() > 0:
        dgate_TK = position_TK.new_empty(position_TK.shape, dtype=torch.float32)
        triton_kernels("experts.permute").activation_backward(
            h_NP,
            da_NF.contiguous(),
            gate_TK.contiguous(),
            position_TK,
            copy_N,
            ends_E,
            dh_NP,
            weighted_NF,
            dgate_TK,
            activation,
        )
        return dh_NP, weighted_NF, dgate_TK
    dgate_TK = position_TK.new_zeros(position_TK.shape, dtype=torch.float32)
    if da_NF.numel() == 0:
        return dh_NP, weighted_NF, dgate_TK
    held = int(ends_E[-1])
    copy_n = copy_N[:held].long()
    gate_n1 = gate_TK.flatten()[copy_n].float().unsqueeze(1)
    h_nGF = h_NP[:held].float().unflatten(1, (num_up_projections(activation), -1))
    a_nF, dh_nGF = activation_gradient(h_nGF, da_NF[:held].float() * gate_n1, activation)
    dgate_TK.view(-1)[copy_n] = (a_nF * da_NF[:held].float()).sum(1)
    dh_NP[:held] = dh_nGF.flatten(1).to(h_NP.dtype)
    weighted_NF[:held] = (a_nF * gate_n1).to(h_NP.dtype)
    return dh_NP, weighted_NF, dgate_TK


activation_backward = define(
    "activation_backward(Tensor h, Tensor da, Tensor gate, Tensor position, Tensor copy, Tensor ends, str activation)"
    " -> (Tensor, Tensor, Tensor)",
    _activation_backward,
    lambda h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, activation: (
        torch.empty_like(h_NP),
        torch.empty_like(da_NF),
        gate_TK.new_empty(gate_TK.shape, dtype=torch.float32),
    ),
)
"""One pass over H and dA' = dO W2^T: ``dH = act'(H) * gate * dA'``, ``A' = gate * act(H)``, ``dgate = <dA', act(H)>``.

Returns ``(dh_NP, weighted_NF, dgate_TK)``; dgate is fp32 and 0 for choices without a row.
"""

# ---- weighted_activation --------------------------------------------------------------------------------------------


def _weighted_activation(h_NP: Tensor, gate_TK: Tensor, copy_N: Tensor, ends_E: Tensor, activation: str) -> Tensor:
    out_NF = h_NP.new_empty(h_NP.shape[0], h_NP.shape[1] // num_up_projections(activation))
    if out_NF.numel() == 0:
        return out_NF
    if launches_triton(h_NP):
        triton_kernels("experts.permute").activate_rows(h_NP, ends_E, out_NF, activation, gate_TK.contiguous(), copy_N)
        return out_NF
    held = int(ends_E[-1])
    gate_n1 = gate_TK.flatten()[copy_N[:held].long()].float().unsqueeze(1)
    a_nF = activate(h_NP[:held].float().unflatten(1, (num_up_projections(activation), -1)), activation)
    out_NF[:held] = (a_nF * gate_n1).to(h_NP.dtype)
    return out_NF


weighted_activation = define(
    "weighted_activation(Tensor h, Tensor gate, Tensor copy, Tensor ends, str activation) -> Tensor",
    _weighted_activation,
    lambda h_NP, gate_TK, copy_N, ends_E, activation: h_NP.new_empty(
        h_NP.shape[0], h_NP.shape[1] // num_up_projections(activation)
    ),
)
"""``A' = gate * act(H)`` alone, for a weight gradient that runs apart from the input gradient (zero-bubble)."""


def permute_to(x_TC: Tensor, position_TR: Tensor, rows: int) -> Tensor:
    """``(N, C)``: token t's row at each of ``position_TR[t]`` that is not -1; others are not written."""
    return _PermuteTo.apply(x_TC, position_TR, rows)


def unpermute_from(y_NC: Tensor, position_TR: Tensor) -> Tensor:
    """``(T, C)``: the sum of each token's rows, in the order of the receivers; 0 for a token without any."""
    return _UnpermuteFrom.apply(y_NC, position_TR)


class _PermuteTo(Function):
    @staticmethod
    def forward(ctx, x_TC, position_TR, rows):
        ctx.save_for_backward(position_TR)
        return permute(x_TC, position_TR, rows)

    @staticmethod
    def backward(ctx, grad_NC):
        (position_TR,) = ctx.saved_tensors
        return unpermute(grad_NC, position_TR, None), None, None


class _UnpermuteFrom(Function):
    @staticmethod
    def forward(ctx, y_NC, position_TR):
        ctx.save_for_backward(position_TR)
        ctx.rows = y_NC.shape[0]
        return unpermute(y_NC, position_TR, None)

    @staticmethod
    def backward(ctx, grad_TC):
        (position_TR,) = ctx.saved_tensors
        return permute(grad_TC, position_TR, ctx.rows), None
