"""Experts' products of rows in float8: the product, quantised weights, and the gather that quantises.

``out[n] = w[e(n)] @ a[n]`` with both operands in E4M3. A row and an expert's weight have a float32 scale each, applied
to the float32 sum. Tensor cores of Hopper take 8-bit operands only with the inner axis last, so that each of a weight's
two products has its own orientation.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.experts.grouped_triton import (
    PARTS,
    ROW_TILE,
    choose_group,
    describe,
    describe_ragged,
    max_row_tiles,
    num_programs,
    split_columns,
    store_ragged,
)
from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_DEEP = 4096
"""Inner sizes from here on take the tile that reads less."""


class Tile(NamedTuple):
    """One configuration of :func:`rows_kernel`."""

    n: int
    k: int
    stages: int
    warps: int
    programs: int
    """Of a multiprocessor, side by side: while one stores its sums the other computes."""


_WIDE = Tile(n=256, k=128, stages=4, warps=8, programs=1)
_TWO = Tile(n=128, k=128, stages=3, warps=4, programs=2)


def rows_times_weight(
    a_NC: Tensor, a_scale_N: Tensor, w_EPC: Tensor, w_scale_E: Tensor, ends_E: Tensor, tiles: Tensor, out_NP: Tensor
) -> None:
    """See :data:`moe_dtensor.kernels.experts.float8.rows_times_weight`."""
    rows, inner = a_NC.shape
    experts, columns, _ = w_EPC.shape
    # Sums in float32 leave no room for the wide one.
    tile = _WIDE if inner >= _DEEP and out_NP.dtype.itemsize == 2 else _TWO
    programs = tile.programs * num_programs(a_NC.get_device())
    rows_kernel[(PARTS * programs,)](
        describe(a_NC, [ROW_TILE, tile.k]),
        describe(w_EPC, [1, tile.n, tile.k]),
        describe_ragged(out_NP, [ROW_TILE, tile.n // 2]),
        a_scale_N,
        w_scale_E,
        ends_E,
        tiles,
        max_row_tiles(rows, experts),
        columns,
        inner,
        GROUP=choose_group(columns * inner),
        ROW_TILE=ROW_TILE,
        COLUMN_TILE=tile.n,
        INNER_TILE=tile.k,
        PARTS=PARTS,
        PROGRAMS=programs,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )


def quantise_weight(w_EPQ: Tensor, scale_E: Tensor, out: Tensor, transposed: bool) -> None:
    """See :data:`moe_dtensor.kernels.experts.float8.quantise_weight`."""
    experts, p, q = w_EPQ.shape
    weight_kernel[(experts, ceil_div(p, 64), ceil_div(q, 128))](
        w_EPQ, scale_E, out, p, q, TRANSPOSED=transposed, P_BLOCK=64, Q_BLOCK=128
    )


def permute(x_TD: Tensor, position_TK: Tensor, out_ND: Tensor, scale_N: Tensor, kept_ND: Tensor | None) -> None:
    """See :data:`moe_dtensor.kernels.experts.float8.permute`."""
    (tokens, choices), width = position_TK.shape, x_TD.shape[1]
    block = next_power_of_2(width)
    permute_kernel[(tokens,)](
        *(x_TD, position_TK, out_ND, scale_N, kept_ND, width),
        K=choices,
        BLOCK=block,
        KEEP=kept_ND is not None,
        num_warps=max(1, min(16, block // 512)),
    )


@triton.jit
def scales(most):
    """What quantising multiplies by, and the scale that undoes it, from the largest magnitude."""
    most = tl.maximum(most, 1e-30)
    return 448.0 / most, most / 448.0  # the largest number of E4M3


@triton.jit
def rows_kernel(
    a_desc,
    w_desc,
    out_desc,
    a_scale_ptr,
    w_scale_ptr,
    ends_ptr,
    table_ptr,
    max_tiles,
    columns,
    inner,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    INNER_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """``grouped_triton.rows_kernel`` with the scales of row and expert applied to the sum."""
    row_tiles = tl.load(table_ptr)
    column_tiles = tl.cdiv(columns, COLUMN_TILE)
    inner_tiles = tl.cdiv(inner, INNER_TILE)
    tiles = row_tiles * column_tiles
    part = tl.cdiv(tiles, PARTS * PROGRAMS) * PROGRAMS
    first = tl.program_id(0) // PROGRAMS * part
    for tile in tl.range(first + tl.program_id(0) % PROGRAMS, tl.minimum(first + part, tiles), PROGRAMS, flatten=True):
        group = tile // (GROUP * column_tiles)
        rest = tile % (GROUP * column_tiles)
        height = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + rest % height
        column = (rest // height) * COLUMN_TILE
        expert = tl.load(table_ptr + 1 + row_tile)
        row = tl.load(table_ptr + 1 + max_tiles + row_tile)
        end = tl.load(ends_ptr + expert)
        acc = tl.zeros((ROW_TILE, COLUMN_TILE), tl.float32)
        for k in range(inner_tiles):
            a = a_desc.load([row, k * INNER_TILE])
            w = w_desc.load([expert, column, k * INNER_TILE]).reshape(COLUMN_TILE, INNER_TILE).T
            acc = tl.dot(a, w, acc)
        rows = row + tl.arange(0, ROW_TILE)
        scale = tl.load(a_scale_ptr + rows, mask=rows < end, other=0.0) * tl.load(w_scale_ptr + expert)
        left, right = split_columns(acc, 2)
        store_ragged(out_desc, row, end - row, column, (left * scale[:, None]).to(out_desc.dtype))
        half: tl.constexpr = COLUMN_TILE // 2
        store_ragged(out_desc, row, end - row, column + half, (right * scale[:, None]).to(out_desc.dtype))


@triton.jit
def weight_kernel(
    w_ptr, scale_ptr, out_ptr, p, q, TRANSPOSED: tl.constexpr, P_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr
):
    """A tile of an expert's weight, as it lies or transposed."""
    expert = tl.program_id(0).to(tl.int64)
    p_at = tl.program_id(1) * P_BLOCK + tl.arange(0, P_BLOCK)
    q_at = tl.program_id(2) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    place = (expert * p + p_at[:, None]) * q + q_at[None, :]
    inside = (p_at < p)[:, None] & (q_at < q)[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    quantised = (w * (1.0 / tl.load(scale_ptr + expert))).to(out_ptr.dtype.element_ty)
    if TRANSPOSED:
        place = (expert * q + q_at[:, None]) * p + p_at[None, :]
        tl.store(out_ptr + place, quantised.T, mask=(p_at < p)[None, :] & (q_at < q)[:, None])
    else:
        tl.store(out_ptr + place, quantised, mask=inside)


@triton.jit
def permute_kernel(
    x_ptr, position_ptr, out_ptr, scale_ptr, kept_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr
):
    """A token: read once, its rows written from registers."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + token * width + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    factor, scale = scales(tl.max(tl.abs(wide), axis=0))
    quantised = (wide * factor).to(out_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + row * width + column, quantised, mask=inside & (row >= 0))
        tl.store(scale_ptr + row, scale, mask=row >= 0)
        if KEEP:
            tl.store(kept_ptr + row * width + column, x, mask=inside & (row >= 0))
