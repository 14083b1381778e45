"""The expert MLP with products in float8: forward and the gradients of inputs; gradients of weights stay as they are.

    x -> round, gather -> [w_up] -> H -> activation, round -> [w_down] -> Y -> gate, gather, sum -> y

Numbers are rounded to E4M3 (Micikevicius et al., 2022), with one scale for each row and one for each expert's weight,
so that the largest becomes 448. What is kept for the backward pass, and the gate's gradient, are those of
:mod:`.autograd`; a weight's gradient reads rows that were not rounded.

The operators have Triton kernels alone; :func:`reference_product` and :func:`reference_gated_product` say the same in
plain PyTorch, one expert at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.experts import permute as plain
from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.grouped import weight_gradient
from moe_dtensor.kernels.experts.sort import Route
from moe_dtensor.kernels.library import define, triton_kernels

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3."""
_SMALLEST = 1e-30

# ---- weights: (E, P, Q) -> scales (E,), and in E4M3 as they lie or transposed ----------------------------------------


def _weight_scales(w_EPQ: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w_EPQ, float("inf"), dim=(1, 2)).float().clamp(min=_SMALLEST) / LARGEST


weight_scales = define(
    "float8_weight_scales(Tensor w) -> Tensor",
    _weight_scales,
    lambda w_EPQ: w_EPQ.new_empty(w_EPQ.shape[0], dtype=torch.float32),
)
"""What undoes the rounding of each expert's weight: its largest magnitude over 448."""


def _quantise_weight(w_EPQ: Tensor, scale_E: Tensor, transposed: bool, after: Tensor | None = None) -> Tensor:
    out = _fake_quantise_weight(w_EPQ, scale_E, transposed)
    triton_kernels("experts.float8").quantise_weight(w_EPQ.contiguous(), scale_E, out, transposed)
    return out


def _fake_quantise_weight(w_EPQ: Tensor, scale_E: Tensor, transposed: bool, after: Tensor | None = None) -> Tensor:
    experts, p, q = w_EPQ.shape
    return w_EPQ.new_empty((experts, q, p) if transposed else (experts, p, q), dtype=E4M3)


quantise_weight = define(
    "float8_quantise_weight(Tensor w, Tensor scale, bool transposed, Tensor? after=None) -> Tensor",
    _quantise_weight,
    _fake_quantise_weight,
)
"""``(E, P, Q)`` in E4M3, or ``(E, Q, P)``: the tensor cores want the inner axis of a product last. ``after`` as in
:data:`.permute.permute`."""

# ---- rows_times_weight ----------------------------------------------------------------------------------------------


def _rows_times_weight(
    a_NC: Tensor, a_scale_N: Tensor, w_EPC: Tensor, w_scale_E: Tensor, ends_E: Tensor, tiles: Tensor, like: Tensor
) -> Tensor:
    out_NP = like.new_empty(a_NC.shape[0], w_EPC.shape[1])
    if out_NP.numel():
        kernels = triton_kernels("experts.float8")
        kernels.rows_times_weight(a_NC, a_scale_N, w_EPC, w_scale_E, ends_E, tiles, out_NP)
    return out_NP


rows_times_weight = define(
    "float8_rows_times_weight(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor ends, Tensor tiles, Tensor "
    "like) -> Tensor",
    _rows_times_weight,
    lambda a_NC, a_scale_N, w_EPC, w_scale_E, ends_E, tiles, like: like.new_empty(a_NC.shape[0], w_EPC.shape[1]),
)
"""``out[n] = w[e(n)] @ a[n]``, ``(N, C) -> (N, P)``, in the dtype of ``like``."""

# ---- permute --------------------------------------------------------------------------------------------------------


def _permute(x_TD: Tensor, position_TK: Tensor, rows: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    out_ND, scale_N, kept_ND = _fake_permute(x_TD, position_TK, rows, keep)
    if out_ND.numel():
        permute = triton_kernels("experts.float8").permute
        permute(x_TD.contiguous(), position_TK, out_ND, scale_N, kept_ND if keep else None)
    return out_ND, scale_N, kept_ND


def _fake_permute(x_TD: Tensor, position_TK: Tensor, rows: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    out_ND = x_TD.new_empty(rows, x_TD.shape[1], dtype=E4M3)
    return out_ND, x_TD.new_empty(rows, dtype=torch.float32), x_TD.new_empty(rows if keep else 0, x_TD.shape[1])


permute = define(
    "float8_permute(Tensor x, Tensor position, SymInt rows, bool keep) -> (Tensor, Tensor, Tensor)",
    _permute,
    _fake_permute,
)
"""``(rows, D)`` in E4M3 with a scale each; with ``keep`` the rows as they are too, else none."""

# ---- activate_rows, activation_backward -----------------------------------------------------------------------------


def _activate_rows(h_NP: Tensor, ends_E: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    out_NF, scale_N = _fake_activate_rows(h_NP, ends_E, activation)
    if out_NF.numel():
        triton_kernels("experts.float8_activation").activate_rows(h_NP, ends_E, out_NF, scale_N, activation)
    return out_NF, scale_N


def _fake_activate_rows(h_NP: Tensor, ends_E: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    rows, width = h_NP.shape
    return h_NP.new_empty(rows, width // num_up_projections(activation), dtype=E4M3), h_NP.new_empty(
        rows, dtype=torch.float32
    )


activate_rows = define(
    "float8_activate_rows(Tensor h, Tensor ends, str activation) -> (Tensor, Tensor)",
    _activate_rows,
    _fake_activate_rows,
)
"""The activation of each row in E4M3, and its scale."""


def _activation_backward(
    h_NP: Tensor, da_NF: Tensor, gate_TK: Tensor, position_TK: Tensor, copy_N: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_activation_backward(h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, activation)
    if not da_NF.numel():
        outputs[-1].zero_()
        return outputs
    triton_kernels("experts.float8_activation").activation_backward(
        h_NP, da_NF, gate_TK.contiguous(), position_TK, copy_N, ends_E, *outputs, activation
    )
    return outputs


def _fake_activation_backward(
    h_NP: Tensor, da_NF: Tensor, gate_TK: Tensor, position_TK: Tensor, copy_N: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(h_NP),
        torch.empty_like(h_NP, dtype=E4M3),
        h_NP.new_empty(h_NP.shape[0], dtype=torch.float32),
        torch.empty_like(da_NF),
        gate_TK.new_empty(gate_TK.shape, dtype=torch.float32),
    )


activation_backward = define(
    "float8_activation_backward(Tensor h, Tensor da, Tensor gate, Tensor position, Tensor copy, Tensor ends, str "
    "activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _activation_backward,
    _fake_activation_backward,
)
"""``(dh_NP, dh_NP in E4M3, scale_N, weighted_NF, dgate_TK)``: :data:`.permute.activation_backward` with dH twice."""

# ---- the MLP --------------------------------------------------------------------------------------------------------


class ExpertMLP(Function):
    """All of it as one node, as that of :mod:`.autograd` is."""

    @staticmethod
    def forward(ctx, x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, tiles, num_rows, activation, backend, keep_rows):
        """``(T, D)``; ``backend`` is that of the weights' gradients."""
        w_up_EPD = w_up_EGFD.flatten(1, 2)
        up_scale_E, down_scale_E = weight_scales(w_up_EPD), weight_scales(w_down_EDF)
        x_ND, x_scale_N, kept_ND = permute(x_TD, route.position, num_rows, keep_rows)
        w_up8 = quantise_weight(w_up_EPD, up_scale_E, False)
        h_NP = rows_times_weight(x_ND, x_scale_N, w_up8, up_scale_E, route.ends, tiles, x_TD)
        del x_ND, w_up8
        a_NF, a_scale_N = activate_rows(h_NP, route.ends, activation)
        w_down8 = quantise_weight(w_down_EDF, down_scale_E, False)
        y_ND = rows_times_weight(a_NF, a_scale_N, w_down8, down_scale_E, route.ends, tiles, x_TD)
        del a_NF, w_down8
        kept = kept_ND if keep_rows else x_TD
        ctx.save_for_backward(kept, w_up_EGFD, w_down_EDF, gate_TK, *route, tiles, h_NP, up_scale_E, down_scale_E)
        ctx.activation, ctx.backend, ctx.keep_rows = activation, backend, keep_rows
        return plain.unpermute(y_ND, route.position, gate_TK)

    @staticmethod
    def backward(ctx, dy_TD):
        """Of x, both weights and the gate; every tensor is dropped as soon as it has been used."""
        kept, w_up_EGFD, w_down_EDF, gate_TK, *route, tiles, h_NP, up_scale_E, down_scale_E = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()  # H is dropped as soon as it has been used
        position_TK, copy_N, ends_E = Route(*route)
        wanted, num_rows = ctx.needs_input_grad, h_NP.shape[0]
        dx_TD = dw_up_EGFD = dw_down_EDF = None
        do8_ND, do_scale_N, do_ND = permute(dy_TD, position_TK, num_rows, True)
        w_down8 = quantise_weight(w_down_EDF, down_scale_E, True, do_ND)
        da_NF = rows_times_weight(do8_ND, do_scale_N, w_down8, down_scale_E, ends_E, tiles, dy_TD)
        del do8_ND, w_down8
        dh_NP, dh8_NP, dh_scale_N, weighted_NF, dgate_TK = activation_backward(
            h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, ctx.activation
        )
        del da_NF, h_NP
        if wanted[2]:
            dw_down_EDF = weight_gradient(do_ND, weighted_NF, ends_E, tiles, ctx.backend)
        del do_ND, weighted_NF
        if wanted[1]:
            x_ND = kept if ctx.keep_rows else plain.permute(kept, position_TK, num_rows, dh_NP)
            dw_up_EGFD = weight_gradient(dh_NP, x_ND, ends_E, tiles, ctx.backend).view(w_up_EGFD.shape)
            del x_ND
        del dh_NP
        if wanted[0]:
            w_up8 = quantise_weight(w_up_EGFD.flatten(1, 2), up_scale_E, True, dh8_NP)
            dx_ND = rows_times_weight(dh8_NP, dh_scale_N, w_up8, up_scale_E, ends_E, tiles, dy_TD)
            del dh8_NP, w_up8
            dx_TD = plain.unpermute(dx_ND, position_TK, None)
        return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK.to(gate_TK.dtype), *[None] * 6


# ---- reference ------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """``x`` with E4M3's digits, scaled by the largest magnitude over ``dims``; in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return wide
    most = wide.abs().amax(dims, keepdim=True).clamp(min=_SMALLEST)
    scaled = wide * (LARGEST / most)
    # Not by a cast, which takes float64 to float32 first. A number's last place is a power of two; below 2^-6 it stays.
    place = torch.ldexp(torch.ones_like(scaled), scaled.frexp().exponent.clamp(min=-5) - 4)
    return (scaled / place).round() * place * (most / LARGEST)


def reference_product(x_nC: Tensor, w_PC: Tensor) -> Tensor:
    """Rows times one expert's weight, ``(n, P)``."""
    return _Product.apply(x_nC, w_PC)


def reference_gated_product(a_nF: Tensor, w_DF: Tensor, gate_n: Tensor) -> Tensor:
    """The same, each row times its gate, ``(n, D)``: the gate's gradient is that of the rounded gradient of A."""
    return _GatedProduct.apply(a_nF, w_DF, gate_n)


class _Product(Function):
    @staticmethod
    def forward(ctx, x_nC, w_PC):
        ctx.save_for_backward(x_nC, w_PC)
        return (rounded(x_nC) @ rounded(w_PC, (0, 1)).T).to(x_nC.dtype)

    @staticmethod
    def backward(ctx, dh_nP):
        x_nC, w_PC = ctx.saved_tensors
        return (rounded(dh_nP) @ rounded(w_PC, (0, 1))).to(x_nC.dtype), dh_nP.T @ x_nC


class _GatedProduct(Function):
    @staticmethod
    def forward(ctx, a_nF, w_DF, gate_n):
        ctx.save_for_backward(a_nF, w_DF, gate_n)
        return (rounded(a_nF) @ rounded(w_DF, (0, 1)).T) * gate_n[:, None]

    @staticmethod
    def backward(ctx, dy_nD):
        a_nF, w_DF, gate_n = ctx.saved_tensors
        dtype = a_nF.dtype
        da_nF = rounded(dy_nD.to(dtype)) @ rounded(w_DF, (0, 1))
        dgate_n, weighted_nF = (da_nF * a_nF).sum(1), gate_n[:, None] * a_nF
        return (gate_n[:, None] * da_nF).to(dtype), dy_nD.to(dtype).T @ weighted_nF.to(dtype), dgate_n
