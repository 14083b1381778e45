"""Triton kernels of :mod:`.heads`: each tensor is read once and written once.

A row is what one norm spans: a head, or all heads of a position. It is held in two tiles, ``a`` the first halves of its
heads and ``b`` the second ones: the pairs that a rotation turns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_ELEMENTS = 2048
"""Of a half, in a tile."""


def norm_and_rotate(x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`moe_dtensor.kernels.heads.norm_and_rotate`."""
    x_BSHC, out_BSHC = _dense(x_BSHC), x_BSHC.new_empty(x_BSHC.shape)
    if x_BSHC.numel():
        sizes, constants = _layout(x_BSHC, weight_W, cos)
        _forward[(ceil_div(sizes[0], constants["ROWS"]),)](
            x_BSHC, weight_W, cos.contiguous(), sin.contiguous(), out_BSHC, x_BSHC.stride(1), *sizes, eps, **constants
        )
    return out_BSHC


def norm_and_rotate_backward(
    dy_BSHC: Tensor, x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See :data:`moe_dtensor.kernels.heads._backward`."""
    dy_BSHC, x_BSHC, dx_BSHC = _dense(dy_BSHC), _dense(x_BSHC), x_BSHC.new_empty(x_BSHC.shape)
    made = programs(x_BSHC)
    width = 0 if weight_W is None else weight_W.shape[0]
    partial_NW = x_BSHC.new_empty(made, width, dtype=torch.float32)
    if x_BSHC.numel() == 0:
        partial_NW.zero_()
    else:
        sizes, constants = _layout(x_BSHC, weight_W, cos)
        _backward[(made,)](
            *(dy_BSHC, x_BSHC, weight_W, cos.contiguous(), sin.contiguous(), dx_BSHC, partial_NW),
            *(dy_BSHC.stride(1), x_BSHC.stride(1)),
            *sizes,
            eps,
            PROGRAMS=made,
            **constants,
        )
    return dx_BSHC, partial_NW


def programs(x: Tensor) -> int:
    """How many programs share the rows of a backward pass."""
    return 8 * _multiprocessors(x.get_device()) if x.is_cuda else 3


@lru_cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(x_BSHC: Tensor) -> Tensor:
    """Positions at one stride from each other, what a position has side by side."""
    batch, length, _, width = x_BSHC.shape
    step = x_BSHC.stride(1)
    if x_BSHC.stride()[2:] == (width, 1) and (batch == 1 or x_BSHC.stride(0) == length * step):
        return x_BSHC
    return x_BSHC.contiguous()


def _layout(x_BSHC: Tensor, weight_W: Tensor | None, cos: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """``(rows, rows of a position, rows of cos)`` and the kernels' constants."""
    batch, length, heads, head = x_BSHC.shape
    width = head if weight_W is None else weight_W.shape[0]
    in_position = heads * head // width
    block = next_power_of_2(width // 2)
    constants = {
        "WIDTH": width,
        "HEAD": head,
        "HAS_NORM": weight_W is not None,
        "BLOCK": block,
        "ROWS": max(1, _ELEMENTS // block),
    }
    return (batch * length * in_position, in_position, cos.shape[0] * length), constants


@triton.jit
def _places(WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Of each pair in a row: its first column, its place in cos and sin, and whether it is there."""
    pair = tl.arange(0, BLOCK)[None, :]
    half: tl.constexpr = HEAD // 2
    return (pair // half) * HEAD + pair % half, pair % half, pair < WIDTH // 2


@triton.jit
def _load_pairs(ptr, stride, row, in_position, column, inside, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    base = (row // in_position).to(tl.int64) * stride + (row % in_position) * WIDTH
    a = tl.load(ptr + base + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + base + column + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _load_turn(cos_ptr, sin_ptr, row, in_position, cos_rows, place, inside, HEAD: tl.constexpr):
    offset = ((row // in_position) % cos_rows) * (HEAD // 2) + place
    return tl.load(cos_ptr + offset, mask=inside, other=0.0), tl.load(sin_ptr + offset, mask=inside, other=0.0)


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride,
    rows,
    in_position,
    cos_rows,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column, place, held = _places(WIDTH, HEAD, BLOCK)
    inside = (row < rows) & held
    a, b = _load_pairs(x_ptr, stride, row, in_position, column, inside, WIDTH, HEAD)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / WIDTH + eps)
        a *= scale * tl.load(weight_ptr + column, mask=held, other=0.0).to(tl.float32)
        b *= scale * tl.load(weight_ptr + column + HEAD // 2, mask=held, other=0.0).to(tl.float32)
    cos, sin = _load_turn(cos_ptr, sin_ptr, row, in_position, cos_rows, place, inside, HEAD)
    out = out_ptr + row.to(tl.int64) * WIDTH + column
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HEAD // 2, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    x_stride,
    rows,
    in_position,
    cos_rows,
    eps,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes every PROGRAMS-th tile of rows, and keeps what they give to the weight's gradient."""
    column, place, held = _places(WIDTH, HEAD, BLOCK)
    half: tl.constexpr = HEAD // 2
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_NORM:
        weight_a = tl.load(weight_ptr + column, mask=held, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + column + half, mask=held, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), PROGRAMS):
        row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & held
        dy_a, dy_b = _load_pairs(dy_ptr, dy_stride, row, in_position, column, inside, WIDTH, HEAD)
        cos, sin = _load_turn(cos_ptr, sin_ptr, row, in_position, cos_rows, place, inside, HEAD)
        a = dy_a * cos + dy_b * sin
        b = dy_b * cos - dy_a * sin
        if HAS_NORM:
            x_a, x_b = _load_pairs(x_ptr, x_stride, row, in_position, column, inside, WIDTH, HEAD)
            scale = tl.rsqrt(tl.sum(x_a * x_a + x_b * x_b, axis=1, keep_dims=True) / WIDTH + eps)
            x_a *= scale
            x_b *= scale
            sum_a += a * x_a
            sum_b += b * x_b
            a *= weight_a
            b *= weight_b
            mean = tl.sum(a * x_a + b * x_b, axis=1, keep_dims=True) / WIDTH
            a = (a - x_a * mean) * scale
            b = (b - x_b * mean) * scale
        out = dx_ptr + row.to(tl.int64) * WIDTH + column
        tl.store(out, a.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(out + half, b.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_NORM:
        out = partial_ptr + tl.program_id(0) * WIDTH + column
        tl.store(out, tl.sum(sum_a, axis=0, keep_dims=True), mask=held)
        tl.store(out + half, tl.sum(sum_b, axis=0, keep_dims=True), mask=held)
