"""The experts' activation and its gradient with rows in float8, whose largest magnitudes are found on the way."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.float8_triton import scales
from moe_dtensor.kernels.experts.permute_triton import load_up
from moe_dtensor.kernels.library import ceil_div, next_power_of_2

WHOLE = 2048
"""Rows up to this wide stay in registers between their largest number and their quantising; wider ones are computed
twice."""


def _constants(hidden: int, activation: str) -> dict[str, Any]:
    whole = hidden <= WHOLE
    # Of wide rows one at a time, so that L1 or L2 holds it for the second pass.
    block = next_power_of_2(hidden) if whole else 2048
    return {
        "ACTIVATION": activation,
        "GROUPS": num_up_projections(activation),
        "ROWS": max(1, 2048 // block),
        "TURNS": 4 if hidden <= 1024 else 1,
        "BLOCK": block,
        "WHOLE": whole,
    }


def activate_rows(h_NP: Tensor, ends_E: Tensor, out_NF: Tensor, scale_N: Tensor, activation: str) -> None:
    """See :data:`moe_dtensor.kernels.experts.float8.activate_rows`."""
    rows, hidden = out_NF.shape
    constants = _constants(hidden, activation)
    activate_kernel[(ceil_div(rows, constants["ROWS"] * constants["TURNS"]),)](
        h_NP, ends_E, out_NF, scale_N, rows, hidden, len(ends_E), **constants
    )


def activation_backward(
    h_NP: Tensor,
    da_NF: Tensor,
    gate_TK: Tensor,
    position_TK: Tensor,
    copy_N: Tensor,
    ends_E: Tensor,
    dh_NP: Tensor,
    dh8_NP: Tensor,
    scale_N: Tensor,
    weighted_NF: Tensor,
    dgate_TK: Tensor,
    activation: str,
) -> None:
    """See :data:`moe_dtensor.kernels.experts.float8.activation_backward`."""
    (rows, hidden), copies = da_NF.shape, position_TK.numel()
    constants = _constants(hidden, activation)
    backward_kernel[(ceil_div(max(rows, copies), constants["ROWS"] * constants["TURNS"]),)](
        *(h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, dh_NP, dh8_NP, scale_N, weighted_NF, dgate_TK),
        *(rows, hidden, len(ends_E), copies),
        **constants,
    )


@triton.jit
def activate_kernel(
    h_ptr,
    ends_ptr,
    out_ptr,
    scale_ptr,
    rows,
    hidden,
    experts,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``out[n] = act(h[n])`` in float8, and its scale."""
    end = tl.minimum(tl.load(ends_ptr + experts - 1), rows)
    first = tl.program_id(0) * ROWS * TURNS
    for begin in range(first, tl.minimum(first + ROWS * TURNS, end), ROWS):
        row_R = (begin + tl.arange(0, ROWS)).to(tl.int64)
        row = row_R[:, None]
        if WHOLE:
            column = tl.arange(0, BLOCK)[None, :]
            inside = (row < end) & (column < hidden)
            _, value, _, up, _ = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
            a = value * up
            factor, scale = scales(tl.max(tl.abs(a), axis=1))
            tl.store(out_ptr + row * hidden + column, (a * factor[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            most = tl.zeros((ROWS,), tl.float32)
            for start in range(0, hidden, BLOCK):
                column = (start + tl.arange(0, BLOCK))[None, :]
                inside = (row < end) & (column < hidden)
                _, value, _, up, _ = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
                most = tl.maximum(most, tl.max(tl.abs(value * up), axis=1))
            factor, scale = scales(most)
            for start in range(0, hidden, BLOCK):
                column = (start + tl.arange(0, BLOCK))[None, :]
                inside = (row < end) & (column < hidden)
                _, value, _, up, _ = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
                a = value * up * factor[:, None]
                tl.store(out_ptr + row * hidden + column, a.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + row_R, scale, mask=row_R < end)


@triton.jit
def _gradients(h_ptr, da_ptr, gate, row, column, inside, hidden, ACTIVATION: tl.constexpr, GROUPS: tl.constexpr):
    """The activation, its gradient without the gate, and dH's one or two halves."""
    _, value, slope, up, up_slope = load_up(h_ptr, row, column, inside, hidden, ACTIVATION, GROUPS)
    da = tl.load(da_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    weighted = da * gate
    return value * up, da, weighted * up * slope, weighted * value * up_slope


@triton.jit
def _most_of(first, second, GROUPS: tl.constexpr):
    """The largest magnitude of each row of dH."""
    most = tl.max(tl.abs(first), axis=1)
    if GROUPS == 2:
        most = tl.maximum(most, tl.max(tl.abs(second), axis=1))
    return most


@triton.jit
def _write(
    dh_ptr, dh8_ptr, weighted_ptr, a, first, second, gate, factor, row, column, inside, hidden, GROUPS: tl.constexpr
):
    """A', and dH in both formats."""
    tl.store(weighted_ptr + row * hidden + column, (a * gate).to(weighted_ptr.dtype.element_ty), mask=inside)
    offset = row * (GROUPS * hidden) + column
    tl.store(dh_ptr + offset, first.to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(dh8_ptr + offset, (first * factor).to(dh8_ptr.dtype.element_ty), mask=inside)
    if GROUPS == 2:
        tl.store(dh_ptr + offset + hidden, second.to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dh8_ptr + offset + hidden, (second * factor).to(dh8_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _whole_rows(
    h_ptr,
    da_ptr,
    dh_ptr,
    dh8_ptr,
    weighted_ptr,
    gate,
    row,
    end,
    hidden,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that stay in registers: the gates' gradients, and the scales of dH."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < end) & (column < hidden)
    a, da, first, second = _gradients(h_ptr, da_ptr, gate, row, column, inside, hidden, ACTIVATION, GROUPS)
    factor, scale = scales(_most_of(first, second, GROUPS))
    factor = factor[:, None]
    _write(dh_ptr, dh8_ptr, weighted_ptr, a, first, second, gate, factor, row, column, inside, hidden, GROUPS)
    return tl.sum(a * da, axis=1), scale


@triton.jit
def backward_kernel(
    h_ptr,
    da_ptr,
    gate_ptr,
    position_ptr,
    copy_ptr,
    ends_ptr,
    dh_ptr,
    dh8_ptr,
    scale_ptr,
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
    WHOLE: tl.constexpr,
):
    """dH in both formats, A', and the gates' gradients."""
    end = tl.minimum(tl.load(ends_ptr + experts - 1), rows)
    program_first = tl.program_id(0) * ROWS * TURNS
    for begin in range(program_first, tl.minimum(program_first + ROWS * TURNS, end), ROWS):
        row_R = (begin + tl.arange(0, ROWS)).to(tl.int64)
        held = row_R < end
        copy = tl.load(copy_ptr + row_R, mask=held, other=0)
        gate = tl.load(gate_ptr + copy, mask=held, other=0.0).to(tl.float32)[:, None]
        row = row_R[:, None]
        if WHOLE:
            dgate, scale = _whole_rows(
                h_ptr, da_ptr, dh_ptr, dh8_ptr, weighted_ptr, gate, row, end, hidden, ACTIVATION, GROUPS, BLOCK
            )
        else:
            dgate = tl.zeros((ROWS,), tl.float32)
            most = tl.zeros((ROWS,), tl.float32)
            for start in range(0, hidden, BLOCK):
                column = (start + tl.arange(0, BLOCK))[None, :]
                inside = (row < end) & (column < hidden)
                a, da, first, second = _gradients(h_ptr, da_ptr, gate, row, column, inside, hidden, ACTIVATION, GROUPS)
                dgate += tl.sum(a * da, axis=1)
                most = tl.maximum(most, _most_of(first, second, GROUPS))
            factor, scale = scales(most)
            for start in range(0, hidden, BLOCK):
                column = (start + tl.arange(0, BLOCK))[None, :]
                inside = (row < end) & (column < hidden)
                a, da, first, second = _gradients(h_ptr, da_ptr, gate, row, column, inside, hidden, ACTIVATION, GROUPS)
                _write(
                    dh_ptr, dh8_ptr, weighted_ptr, a, first, second, gate, factor[:, None], row, column, inside,
                    hidden, GROUPS,
                )  # fmt: skip
        tl.store(dgate_ptr + copy, dgate, mask=held)
        tl.store(scale_ptr + row_R, scale, mask=held)
    # The same numbers once more, as copies: those without a row.
    copies_here = (program_first + tl.arange(0, ROWS * TURNS)).to(tl.int64)
    position = tl.load(position_ptr + copies_here, mask=copies_here < copies, other=0)
    tl.store(dgate_ptr + copies_here, 0.0, mask=position < 0)
