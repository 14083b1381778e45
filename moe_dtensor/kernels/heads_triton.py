"""Triton kernels of :mod:`.heads`: each tensor is read once and written once.

A row is what one norm spans of what is here: a head, or all heads of a position. It is held in two tiles, ``a`` the
first halves of its heads and ``b`` the second ones: the pairs that a rotation turns. Rows are counted in the order of
x; y and its gradient have their tokens in whole sequences.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_ELEMENTS = 1024
"""Of a half, in a tile, as far as a row is not longer: for two warps."""


def norm_and_rotate(
    x_RQHC: Tensor,
    weight_W: Tensor | None,
    squares_T: Tensor | None,
    width: int,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shards: int,
) -> Tensor:
    """See :data:`moe_dtensor.kernels.heads._forward`."""
    x_RQHC = dense(x_RQHC)
    sequences, length, heads, head = x_RQHC.shape
    out_BSHC = x_RQHC.new_empty(sequences // shards, length * shards, heads, head)
    if x_RQHC.numel():
        sizes, constants = layout(x_RQHC.shape, weight_W, cos, shards)
        _forward[(ceil_div(sizes[0], constants["ROWS"]),)](
            *(
                x_RQHC,
                weight_W,
                None if squares_T is None else squares_T.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                out_BSHC,
                x_RQHC.stride(1),
            ),
            *sizes,
            eps,
            width if squares_T is not None else constants["WIDTH"],
            GIVEN=squares_T is not None,
            **constants,
        )
    return out_BSHC


def norm_and_rotate_backward(
    dy_BSHC: Tensor,
    x_RQHC: Tensor | None,
    weight_W: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shards: int,
) -> tuple[Tensor, Tensor]:
    """See :data:`moe_dtensor.kernels.heads._backward`."""
    dy_BSHC, x_RQHC = dense(dy_BSHC), None if x_RQHC is None else dense(x_RQHC)
    batch, length, heads, head = dy_BSHC.shape
    dx_RQHC = dy_BSHC.new_empty(batch * shards, length // shards, heads, head)
    partial_NW = empty_partial(dy_BSHC, weight_W)
    if dy_BSHC.numel():
        sizes, constants = layout(dx_RQHC.shape, weight_W, cos, shards)
        _backward[(len(partial_NW),)](
            *(dy_BSHC, x_RQHC, weight_W, cos.contiguous(), sin.contiguous(), dx_RQHC, partial_NW),
            *(dy_BSHC.stride(1), 0 if x_RQHC is None else x_RQHC.stride(1)),
            *sizes,
            eps,
            PROGRAMS=len(partial_NW),
            **constants,
        )
    return dx_RQHC, partial_NW


def programs(x: Tensor) -> int:
    """How many programs share the rows of a backward pass."""
    return 8 * _multiprocessors(x.get_device()) if x.is_cuda else 3


@lru_cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def empty_partial(x: Tensor, weight_W: Tensor | None) -> Tensor:
    """Room for what each program gives to the weight's gradient, and zeros where none runs."""
    shape = programs(x), 0 if weight_W is None else weight_W.shape[0]
    return (x.new_empty if x.numel() else x.new_zeros)(shape, dtype=torch.float32)


def dense(x: Tensor) -> Tensor:
    """Positions at one stride from each other, what a position has side by side."""
    batch, length, _, width = x.shape
    step = x.stride(1)
    if x.stride()[2:] == (width, 1) and (batch == 1 or x.stride(0) == length * step):
        return x
    return x.contiguous()


def layout(
    shape: torch.Size, weight_W: Tensor | None, cos: Tensor, shards: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """``(rows, rows of a position, rows of cos, positions of a shard, sequences)`` and the kernels' constants, for the
    shape of x."""
    stacked, length, heads, head = shape
    width = head if weight_W is None else weight_W.shape[0]
    in_position = heads * head // width
    block = next_power_of_2(width // 2)
    rows_at_once = max(1, _ELEMENTS // block)
    constants = {
        "WIDTH": width,
        "HEAD": head,
        "HAS_NORM": weight_W is not None,
        "SHARDS": shards,
        "BLOCK": block,
        "ROWS": rows_at_once,
        "num_warps": min(8, max(2, rows_at_once * block * 2 // _ELEMENTS)),
    }
    rows = stacked * length * in_position
    return (rows, in_position, cos.shape[0] * length * shards, length, stacked // shards), constants


@triton.jit
def columns(WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Of each pair in a row: its first column, its place in cos and sin, and whether it is there."""
    pair = tl.arange(0, BLOCK)[None, :]
    half: tl.constexpr = HEAD // 2
    return (pair // half) * HEAD + pair % half, pair % half, pair < WIDTH // 2


@triton.jit
def in_sequences(token, length, sequences, SHARDS: tl.constexpr):
    """The place of a token when those of all shards are in whole sequences."""
    place = token
    if SHARDS > 1:
        stacked = token // length
        place = ((stacked % sequences) * SHARDS + stacked // sequences) * length + token % length
    return place


@triton.jit
def load_pairs(ptr, offset, inside, HEAD: tl.constexpr):
    """Both tiles, of pairs whose first is at ``offset``."""
    a = tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + offset + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(ptr, offset, a, b, inside, HEAD: tl.constexpr):
    """The reverse of :func:`load_pairs`."""
    tl.store(ptr + offset, a.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + offset + HEAD // 2, b.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_turn(cos_ptr, sin_ptr, token, cos_rows, place, inside, HEAD: tl.constexpr):
    """cos and sin of pairs of tokens, which are in whole sequences."""
    offset = (token % cos_rows) * (HEAD // 2) + place
    return tl.load(cos_ptr + offset, mask=inside, other=0.0), tl.load(sin_ptr + offset, mask=inside, other=0.0)


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    squares_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride,
    rows,
    in_position,
    cos_rows,
    length,
    sequences,
    eps,
    width,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GIVEN: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``GIVEN``: a row is a part of what the norm spans, ``width``, whose squares are known."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column, place, held = columns(WIDTH, HEAD, BLOCK)
    inside = (row < rows) & held
    token, column_of_row = row // in_position, (row % in_position) * WIDTH + column
    a, b = load_pairs(x_ptr, token.to(tl.int64) * stride + column_of_row, inside, HEAD)
    if HAS_NORM:
        if GIVEN:
            squares = tl.load(squares_ptr + row, mask=row < rows, other=1.0)
        else:
            squares = tl.sum(a * a + b * b, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / width + eps)
        weight_a, weight_b = load_pairs(weight_ptr, column, held, HEAD)
        a *= scale * weight_a
        b *= scale * weight_b
    there = in_sequences(token, length, sequences, SHARDS)
    cos, sin = load_turn(cos_ptr, sin_ptr, there, cos_rows, place, inside, HEAD)
    offset = there.to(tl.int64) * (in_position * WIDTH) + column_of_row
    store_pairs(out_ptr, offset, a * cos - b * sin, a * sin + b * cos, inside, HEAD)


@triton.jit
def store_sums(partial_ptr, sum_a, sum_b, column, held, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """What a program gives to the weight's gradient."""
    a, b = tl.sum(sum_a, axis=0, keep_dims=True), tl.sum(sum_b, axis=0, keep_dims=True)
    store_pairs(partial_ptr, tl.program_id(0) * WIDTH + column, a, b, held, HEAD)


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
    length,
    sequences,
    eps,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes every PROGRAMS-th tile of rows, and keeps what they give to the weight's gradient."""
    column, place, held = columns(WIDTH, HEAD, BLOCK)
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_NORM:
        weight_a, weight_b = load_pairs(weight_ptr, column, held, HEAD)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), PROGRAMS):
        row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & held
        token, column_of_row = row // in_position, (row % in_position) * WIDTH + column
        there = in_sequences(token, length, sequences, SHARDS)
        dy_a, dy_b = load_pairs(dy_ptr, there.to(tl.int64) * dy_stride + column_of_row, inside, HEAD)
        cos, sin = load_turn(cos_ptr, sin_ptr, there, cos_rows, place, inside, HEAD)
        a = dy_a * cos + dy_b * sin
        b = dy_b * cos - dy_a * sin
        if HAS_NORM:
            x_a, x_b = load_pairs(x_ptr, token.to(tl.int64) * x_stride + column_of_row, inside, HEAD)
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
        store_pairs(dx_ptr, row.to(tl.int64) * WIDTH + column, a, b, inside, HEAD)
    if HAS_NORM:
        store_sums(partial_ptr, sum_a, sum_b, column, held, WIDTH, HEAD)
