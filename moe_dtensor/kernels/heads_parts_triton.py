"""Triton kernels of :mod:`.heads` where a norm spans more heads than are here.

A row is all heads of a token that are here, in the order of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.heads_triton import (
    columns,
    dense,
    empty_partial,
    in_sequences,
    layout,
    load_pairs,
    load_turn,
    store_pairs,
    store_sums,
)
from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_ELEMENTS = 4096
"""In a tile, of which squares are summed."""


def squares_of_heads(x_RQHC: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.heads._squares`."""
    x_RQHC = dense(x_RQHC)
    tokens, width = x_RQHC.shape[0] * x_RQHC.shape[1], x_RQHC.shape[2] * x_RQHC.shape[3]
    squares_T = x_RQHC.new_empty(tokens, dtype=torch.float32)
    if tokens:
        block = next_power_of_2(width)
        rows = max(1, _ELEMENTS // block)
        grid = (ceil_div(tokens, rows),)
        _squares[grid](x_RQHC, squares_T, x_RQHC.stride(1), tokens, WIDTH=width, BLOCK=block, ROWS=rows)
    return squares_T


def backward_sums(
    dy_BSHC: Tensor,
    x_RQHC: Tensor,
    weight_W: Tensor,
    squares_T: Tensor,
    width: int,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shards: int,
) -> tuple[Tensor, Tensor]:
    """See :data:`moe_dtensor.kernels.heads._backward_sums`."""
    dy_BSHC, x_RQHC, squares_T = dense(dy_BSHC), dense(x_RQHC), squares_T.contiguous()
    dsquares_T, partial_NW = torch.empty_like(squares_T), empty_partial(dy_BSHC, weight_W)
    if dy_BSHC.numel():
        sizes, constants = _layout(x_RQHC, weight_W, cos, shards)
        _backward_sums[(len(partial_NW),)](
            *(dy_BSHC, x_RQHC, weight_W, squares_T, cos.contiguous(), sin.contiguous(), dsquares_T, partial_NW),
            *(dy_BSHC.stride(1), x_RQHC.stride(1)),
            *sizes,
            eps,
            width,
            PROGRAMS=len(partial_NW),
            **constants,
        )
    return dsquares_T, partial_NW


def backward_given(
    dsquares_T: Tensor,
    dy_BSHC: Tensor,
    x_RQHC: Tensor,
    weight_W: Tensor,
    squares_T: Tensor,
    width: int,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shards: int,
) -> Tensor:
    """See :data:`moe_dtensor.kernels.heads._backward_given`."""
    dy_BSHC, x_RQHC, dx_RQHC = dense(dy_BSHC), dense(x_RQHC), x_RQHC.new_empty(x_RQHC.shape)
    if dy_BSHC.numel():
        sizes, constants = _layout(x_RQHC, weight_W, cos, shards)
        _backward_given[(ceil_div(sizes[0], constants["ROWS"]),)](
            *(dy_BSHC, x_RQHC, weight_W, squares_T.contiguous(), dsquares_T.contiguous()),
            *(cos.contiguous(), sin.contiguous(), dx_RQHC, dy_BSHC.stride(1), x_RQHC.stride(1)),
            *sizes,
            eps,
            width,
            **constants,
        )
    return dx_RQHC


def _layout(x_RQHC: Tensor, weight_W: Tensor, cos: Tensor, shards: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """That of :mod:`.heads_triton`, where a token is a row."""
    (rows, _, *sizes), constants = layout(x_RQHC.shape, weight_W, cos, shards)
    return (rows, *sizes), {name: constants[name] for name in ("WIDTH", "HEAD", "SHARDS", "BLOCK", "ROWS", "num_warps")}


@triton.jit
def _squares(x_ptr, out_ptr, stride, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < WIDTH)
    x = tl.load(x_ptr + token.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token, tl.sum(x * x, axis=1, keep_dims=True), mask=token < tokens)


@triton.jit
def _backward_sums(
    dy_ptr,
    x_ptr,
    weight_ptr,
    squares_ptr,
    cos_ptr,
    sin_ptr,
    dsquares_ptr,
    partial_ptr,
    dy_stride,
    x_stride,
    tokens,
    cos_rows,
    length,
    sequences,
    eps,
    width,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes every PROGRAMS-th tile of tokens, and keeps what they give to the weight's gradient."""
    column, place, held = columns(WIDTH, HEAD, BLOCK)
    sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    weight_a, weight_b = load_pairs(weight_ptr, column, held, HEAD)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), PROGRAMS):
        token = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < tokens) & held
        there = in_sequences(token, length, sequences, SHARDS)
        dy_a, dy_b = load_pairs(dy_ptr, there.to(tl.int64) * dy_stride + column, inside, HEAD)
        cos, sin = load_turn(cos_ptr, sin_ptr, there, cos_rows, place, inside, HEAD)
        x_a, x_b = load_pairs(x_ptr, token.to(tl.int64) * x_stride + column, inside, HEAD)
        scale = tl.rsqrt(tl.load(squares_ptr + token, mask=token < tokens, other=1.0) / width + eps)
        a = (dy_a * cos + dy_b * sin) * x_a
        b = (dy_b * cos - dy_a * sin) * x_b
        sum_a += a * scale
        sum_b += b * scale
        dscale = tl.sum(a * weight_a + b * weight_b, axis=1, keep_dims=True)
        tl.store(dsquares_ptr + token, -0.5 * dscale * scale * scale * scale / width, mask=token < tokens)
    store_sums(partial_ptr, sum_a, sum_b, column, held, WIDTH, HEAD)


@triton.jit
def _backward_given(
    dy_ptr,
    x_ptr,
    weight_ptr,
    squares_ptr,
    dsquares_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dy_stride,
    x_stride,
    tokens,
    cos_rows,
    length,
    sequences,
    eps,
    width,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column, place, held = columns(WIDTH, HEAD, BLOCK)
    inside = (token < tokens) & held
    there = in_sequences(token, length, sequences, SHARDS)
    dy_a, dy_b = load_pairs(dy_ptr, there.to(tl.int64) * dy_stride + column, inside, HEAD)
    cos, sin = load_turn(cos_ptr, sin_ptr, there, cos_rows, place, inside, HEAD)
    x_a, x_b = load_pairs(x_ptr, token.to(tl.int64) * x_stride + column, inside, HEAD)
    weight_a, weight_b = load_pairs(weight_ptr, column, held, HEAD)
    scale = tl.rsqrt(tl.load(squares_ptr + token, mask=token < tokens, other=1.0) / width + eps)
    dsquares = tl.load(dsquares_ptr + token, mask=token < tokens, other=0.0)
    a = (dy_a * cos + dy_b * sin) * weight_a * scale + 2 * dsquares * x_a
    b = (dy_b * cos - dy_a * sin) * weight_b * scale + 2 * dsquares * x_b
    store_pairs(dx_ptr, token.to(tl.int64) * WIDTH + column, a, b, inside, HEAD)
