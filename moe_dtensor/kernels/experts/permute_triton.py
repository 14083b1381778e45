"""Triton kernels of :mod:`.permute`. All are bound by memory bandwidth: each tensor is read once and written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_COLUMNS = 1024
"""Of a row, for one program of an activation. Its gradient takes whole rows, for the gate's."""


def permute(x_TD: Tensor, position_TK: Tensor, out_ND: Tensor) -> None:
    """Write ``out[position[t, k]] = x[t]`` for positions >= 0."""
    (tokens, choices), width = position_TK.shape, x_TD.shape[1]
    block = min(2048, next_power_of_2(width))
    _permute[(tokens, ceil_div(width, block))](x_TD, position_TK, out_ND, width, K=choices, BLOCK=block)


def unpermute(y_ND: Tensor, position_TK: Tensor, gate_TK: Tensor | None, out_TD: Tensor) -> None:
    """Write ``out[t] = sum_k gate[t, k] * y[position[t, k]]``."""
    (tokens, choices), width = position_TK.shape, y_ND.shape[1]
    block = min(1024, next_power_of_2(width))
    gate_TK = None if gate_TK is None else gate_TK.contiguous()
    _unpermute[(tokens, ceil_div(width, block))](
        y_ND, position_TK, gate_TK, out_TD, width, K=choices, BLOCK=block, HAS_GATE=gate_TK is not None
    )


def activate_rows(
    h_NP: Tensor,
    ends_E: Tensor,
    out_NF: Tensor,
    activation: str,
    gate_TK: Tensor | None = None,
    copy_N: Tensor | None = None,
) -> None:
    """Write the activation of each row, times its gate if one is given."""
    rows, hidden = out_NF.shape
    constants = _activation_constants(hidden, activation)
    grid = (ceil_div(rows, constants["ROWS"] * constants["TURNS"]), ceil_div(hidden, _COLUMNS))
    _activate_rows[grid](
        h_NP,
        ends_E,
        out_NF,
        gate_TK,
        copy_N,
        rows,
        hidden,
        len(ends_E),
        **constants,
        COLUMNS=_COLUMNS,
        HAS_GATE=gate_TK is not None,
    )


def activation_backward(
    h_NP: Tensor,
    da_NF: Tensor,
    gate_TK: Tensor,
    position_TK: Tensor,
    copy_N: Tensor,
    ends_E: Tensor,
    dh_NP: Tensor,
    weighted_NF: Tensor,
    dgate_TK: Tensor,
    activation: str,
) -> None:
    """Write dH, A' and dgate in one pass."""
    (rows, hidden), copies = da_NF.shape, position_TK.numel()
    constants = _activation_constants(hidden, activation)
    _activation_backward[(ceil_div(max(rows, copies), constants["ROWS"] * constants["TURNS"]),)](
        *(h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, dh_NP, weighted_NF, dgate_TK),
        *(rows, hidden, len(ends_E), copies),
        **constants,
    )


def _activation_constants(hidden: int, activation: str) -> dict[str, Any]:
    # Short rows are taken in two turns: where rows are allocated for the worst case, many programs have nothing to do,
    # and to start one takes 1.5 ns.
    groups, block = num_up_projections(activation), min(256, next_power_of_2(hidden))
    turns = 2 if hidden <= 1024 else 1
    return {"ACTIVATION": activation, "GROUPS": groups, "ROWS": 8, "TURNS": turns, "BLOCK": block}


@triton.jit
def write_rows(out_ptr, x, position_ptr, token, column, inside, width, K: tl.constexpr):
    """Write a token's columns to each of its rows."""
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + row * width + column, x, mask=inside & (row >= 0))


@triton.jit
def sum_rows(
    y_ptr,
    position_ptr,
    gate_ptr,
    token,
    column,
    inside,
    width,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """The sum of a token's rows, each times its gate if there is one, in the order of its choices."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        y = tl.load(y_ptr + row * width + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if HAS_GATE:
            y *= tl.load(gate_ptr + token * K + k, mask=row >= 0, other=0.0).to(tl.float32)
        total += y
    return total


@triton.jit
def _permute(x_ptr, position_ptr, out_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + token * width + column, mask=inside)
    write_rows(out_ptr, x, position_ptr, token, column, inside, width, K)


@triton.jit
def _unpermute(
    y_ptr, position_ptr, gate_ptr, out_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr, HAS_GATE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = sum_rows(y_ptr, position_ptr, gate_ptr, token, column, inside, width, K, BLOCK, HAS_GATE)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _act(x, KIND: tl.constexpr):
    """The activation and its derivative at x (fp32)."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "clamped":
        g = tl.minimum(x, 7.0)
        s = tl.sigmoid(1.702 * g)
        value = g * s
        slope = tl.where(x <= 7.0, s + 1.702 * value * (1.0 - s), 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def load_up(h_ptr, row, column, inside, hidden, ACTIVATION: tl.constexpr, GROUPS: tl.constexpr):
    """The activated first projection, its slope, the factor that the second one gives (1 for plain activations), and
    that one's slope."""
    KIND: tl.constexpr = (
        "silu"
        if ACTIVATION == "swiglu"
        else ("gelu" if ACTIVATION == "geglu" else ("clamped" if ACTIVATION == "swiglu_clamped" else ACTIVATION))
    )
    offset = row * (GROUPS * hidden) + column
    first = tl.load(h_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(first, KIND)
    if GROUPS == 2:
        up = tl.load(h_ptr + offset + hidden, mask=inside, other=0.0).to(tl.float32)
    else:
        up = tl.full(first.shape, 1.0, tl.float32)
    up_slope = tl.full(first.shape, 1.0, tl.float32)
    if KIND == "clamped":
        up_slope = tl.where(tl.abs(up) <= 7.0, 1.0, 0.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
    return offset, value, slope, up, up_slope


@triton.jit
def _activate_rows(
    h_ptr,
    ends_ptr,
    out_ptr,
    gate_ptr,
    copy_ptr,
    rows,
    hidden,
    experts,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    end = tl.minimum(tl.load(ends_ptr + experts - 1), rows)
    first = tl.program_id(0) * ROWS * TURNS
    for begin in range(first, tl.minimum(first + ROWS * TURNS, end), ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        if HAS_GATE:
            copy = tl.load(copy_ptr + row, mask=row < end, other=0)
            gate = tl.load(gate_ptr + copy, mask=row < end, other=0.0).to(tl.float32)
        left = tl.program_id(1) * COLUMNS
        for start in range(left, tl.minimum(left + COLUMNS, hidden), BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            inside = (row < end) & (column < hidden)
            _, value, _, up, _ = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
            a = value * up
            if HAS_GATE:
                a *= gate
            tl.store(out_ptr + row * hidden + column, a.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(
    h_ptr,
    da_ptr,
    gate_ptr,
    position_ptr,
    copy_ptr,
    ends_ptr,
    dh_ptr,
    weighted_ptr,
    dgate_ptr,
    rows,
    hidden,
    experts,
    copies,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    end = tl.minimum(tl.load(ends_ptr + experts - 1), rows)
    first = tl.program_id(0) * ROWS * TURNS
    for begin in range(first, tl.minimum(first + ROWS * TURNS, end), ROWS):
        row_R = (begin + tl.arange(0, ROWS)).to(tl.int64)
        held = row_R < end
        copy = tl.load(copy_ptr + row_R, mask=held, other=0)
        gate = tl.load(gate_ptr + copy, mask=held, other=0.0).to(tl.float32)[:, None]
        row = row_R[:, None]
        dgate = tl.zeros((ROWS,), tl.float32)
        for start in range(0, hidden, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            inside = (row < end) & (column < hidden)
            offset, value, slope, up, up_slope = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
            da = tl.load(da_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
            a = value * up
            dgate += tl.sum(a * da, axis=1)
            da *= gate
            tl.store(weighted_ptr + row * hidden + column, (a * gate).to(weighted_ptr.dtype.element_ty), mask=inside)
            tl.store(dh_ptr + offset, (da * up * slope).to(dh_ptr.dtype.element_ty), mask=inside)
            if GROUPS == 2:
                tl.store(dh_ptr + offset + hidden, (da * value * up_slope).to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dgate_ptr + copy, dgate, mask=held)
    # The same numbers once more, as copies: those without a row.
    copies_here = (first + tl.arange(0, ROWS * TURNS)).to(tl.int64)
    position = tl.load(position_ptr + copies_here, mask=copies_here < copies, other=0)
    tl.store(dgate_ptr + copies_here, 0.0, mask=position < 0)
