"""Our own grouped GEMMs: which tiles, how many programs, and the kernels.

Bulk tensor loads (TMA), tensor cores, one program at a time on a multiprocessor. Rows are sorted by expert, and an
expert's rows begin anywhere, so a tile of rows may reach into the next expert's. The extra rows are computed and not
stored: ``triton.tools.ragged_tma`` clips a store (and zero-fills a load) at the expert's end in hardware, which a
branch could not do without ending the loop's software pipeline.

No program is given its share of the whole work beforehand. Beside a collective, which takes some multiprocessors for
itself, those that come last would double the time; and tiles of a weight's gradient are as long as their expert's rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

ROW_TILE = 128
# An expert's weight above this many bytes does not stay in the L2 cache while one row tile sweeps over it.
_L2_BYTES = 24 << 20
_WEIGHT_GROUP = 4
PARTS = 4
"""Parts of a product of rows, one after the other, each with a program for every multiprocessor. With more of them
pipelines fill and drain more often."""


class Tile(NamedTuple):
    """One configuration of a GEMM kernel. ``m`` is ROW_TILE for rows; see the kernels for the rest."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    epilogue: int
    """The accumulator is stored in this many column slices, each of which needs shared memory only once."""


_HALF = Tile(m=128, n=256, k=64, stages=4, warps=8, epilogue=2)
# float32 in full precision has no tensor cores: a small tile, right rather than fast.
_FLOAT = Tile(m=128, n=64, k=32, stages=2, warps=8, epilogue=1)


def choose_tile(dtype: torch.dtype, columns: int) -> Tile:
    """The tile for a result of this many columns."""
    if dtype == torch.float32:
        return _FLOAT
    if columns <= 128:
        return _HALF._replace(n=128, stages=4, epilogue=1)
    return _HALF


def choose_group(weight_bytes: int) -> int:
    """Row tiles that go side by side: many where they share a weight that L2 does not hold, else few."""
    return 2 if weight_bytes <= _L2_BYTES else 12


@lru_cache
def num_programs(device: int) -> int:
    """One for each multiprocessor; a few under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 3


def max_row_tiles(rows: int, num_experts: int) -> int:
    """Room for all tiles of rows: every expert may end in a part of one."""
    return rows // ROW_TILE + num_experts


def fake_tiles(ends_E: Tensor, rows: int) -> Tensor:
    """The tile table's shape: the number of row tiles, then (expert, first row) of each."""
    return ends_E.new_empty(1 + 2 * max_row_tiles(rows, ends_E.shape[0]))


def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
    """Cut each expert's rows into tiles of ROW_TILE, on the device."""
    table = fake_tiles(ends_E, rows)
    experts = len(ends_E)
    bins = max(2, next_power_of_2(experts))
    make_tiles_kernel[(experts,)](
        ends_E, table, experts, max_row_tiles(rows, experts), ROW_TILE=ROW_TILE, EXPERTS=bins, BLOCK=64
    )
    return table


def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.rows_times_weight`."""
    rows, inner = a_N.shape
    experts, p, q = w_EPQ.shape
    columns = p if transposed else q
    out_N = a_N.new_empty(rows, columns)
    tile, programs = choose_tile(a_N.dtype, columns), num_programs(a_N.get_device())
    rows_kernel[(PARTS * programs,)](
        describe(a_N, [ROW_TILE, tile.k]),
        describe(w_EPQ, [1, tile.n, tile.k] if transposed else [1, tile.k, tile.n]),
        describe_ragged(out_N, [ROW_TILE, tile.n // tile.epilogue]),
        ends_E,
        tiles,
        max_row_tiles(rows, experts),
        columns,
        inner,
        TRANSPOSED=transposed,
        GROUP=choose_group(p * q * a_N.dtype.itemsize),
        ROW_TILE=ROW_TILE,
        COLUMN_TILE=tile.n,
        INNER_TILE=tile.k,
        EPILOGUE=tile.epilogue,
        PARTS=PARTS,
        PROGRAMS=programs,
        PRECISION=_precision(a_N.dtype),
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out_N


def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.weight_gradient`."""
    experts, p, q = ends_E.shape[0], l_NP.shape[1], r_NQ.shape[1]
    out_EPQ = l_NP.new_empty(experts, p, q)
    tile = choose_tile(l_NP.dtype, q)
    weight_kernel[(experts * ceil_div(p, tile.m) * ceil_div(q, tile.n),)](
        describe_ragged(l_NP, [tile.k, tile.m]),
        describe_ragged(r_NQ, [tile.k, tile.n]),
        describe(out_EPQ, [1, tile.m, tile.n // tile.epilogue]),
        ends_E,
        p,
        q,
        P_TILE=tile.m,
        Q_TILE=tile.n,
        ROWS_TILE=tile.k,
        EPILOGUE=tile.epilogue,
        GROUP=_WEIGHT_GROUP,
        PRECISION=_precision(l_NP.dtype),
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out_EPQ


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def describe(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A contiguous tensor, in blocks. Its address and all strides but the last are multiples of 16 bytes."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block_shape)


def describe_ragged(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """Contiguous rows, in blocks that are clipped at an expert's last row.

    Follows ``triton.tools.ragged_tma.create_ragged_descriptor``, without a bound on the columns of a block.
    """
    columns, far = x.shape[1], 1 << 30
    shape, strides = [0x7FFF0000, 0x7FFF0000, far, columns], [(1 << 34) - columns, columns, columns, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, *block_shape])


@triton.jit
def make_tiles_kernel(
    ends_ptr, table_ptr, experts, max_tiles, ROW_TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per expert: write ``table = [tiles, expert of each, first row of each]``."""
    expert = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + ids, mask=ids < experts, other=0)
    begins = tl.load(ends_ptr + ids - 1, mask=(ids > 0) & (ids < experts), other=0)
    tiles = (ends - begins + ROW_TILE - 1) // ROW_TILE
    first = tl.sum(tl.where(ids < expert, tiles, 0))
    mine = tl.sum(tl.where(ids == expert, tiles, 0))
    begin = tl.sum(tl.where(ids == expert, begins, 0))
    for start in range(0, mine, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(table_ptr + 1 + first + tile, expert, mask=tile < mine)
        tl.store(table_ptr + 1 + max_tiles + first + tile, begin + tile * ROW_TILE, mask=tile < mine)
    if expert == experts - 1:
        tl.store(table_ptr, first + mine)


@triton.jit
def split_columns(acc, PARTS: tl.constexpr):
    """The left and right half of a tile (both the same if it is not split)."""
    if PARTS == 1:
        left = acc
        right = acc
    else:
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def store_ragged(desc, begin, size, column, tile):
    """Store a tile at row ``begin``, all but what lies past ``size`` rows; ``ragged_tma.store_ragged`` for two axes."""
    x, y, z = to_ragged_indices(begin, size, 0)
    desc.store([x, y, z, column], tile.reshape(1, 1, tile.shape[0], tile.shape[1]))


@triton.jit
def _load_ragged(desc, begin, size, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile at row ``begin + row``, zeros past ``begin + size``."""
    x, y, z = to_ragged_indices(begin, size, row)
    return desc.load([x, y, z, column]).reshape(ROWS, COLUMNS)


@triton.jit
def rows_kernel(
    a_desc,
    w_desc,
    out_desc,
    ends_ptr,
    table_ptr,
    max_tiles,
    columns,
    inner,
    TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    INNER_TILE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[n] = a[n] @ w[e(n)]``, or ``w[e(n)] @ a[n]`` with TRANSPOSED.

    Columns go fastest, so that a tile of rows and its expert's weight stay in L2; GROUP row tiles go side by side
    where the weight is too large for that.
    """
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
            if TRANSPOSED:
                w = w_desc.load([expert, column, k * INNER_TILE]).reshape(COLUMN_TILE, INNER_TILE).T
            else:
                w = w_desc.load([expert, k * INNER_TILE, column]).reshape(INNER_TILE, COLUMN_TILE)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        left, right = split_columns(acc, EPILOGUE)
        store_ragged(out_desc, row, end - row, column, left.to(out_desc.dtype))
        if EPILOGUE == 2:
            store_ragged(out_desc, row, end - row, column + COLUMN_TILE // 2, right.to(out_desc.dtype))


@triton.jit
def weight_kernel(
    l_desc,
    r_desc,
    out_desc,
    ends_ptr,
    p,
    q,
    P_TILE: tl.constexpr,
    Q_TILE: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[e] = l[rows of e]^T @ r[rows of e]``; zeros for an expert with no row."""
    p_tiles = tl.cdiv(p, P_TILE)
    q_tiles = tl.cdiv(q, Q_TILE)
    tile = tl.program_id(0)
    expert = tile // (p_tiles * q_tiles)
    within = tile % (p_tiles * q_tiles)
    group = within // (GROUP * q_tiles)
    rest = within % (GROUP * q_tiles)
    height = tl.minimum(p_tiles - group * GROUP, GROUP)
    p_start = (group * GROUP + rest % height) * P_TILE
    q_start = (rest // height) * Q_TILE
    end = tl.load(ends_ptr + expert)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((P_TILE, Q_TILE), tl.float32)
    for row in range(0, end - begin, ROWS_TILE):
        left_rows = _load_ragged(l_desc, begin, end - begin, row, p_start, ROWS_TILE, P_TILE)
        right_rows = _load_ragged(r_desc, begin, end - begin, row, q_start, ROWS_TILE, Q_TILE)
        acc = tl.dot(left_rows.T, right_rows, acc, input_precision=PRECISION)
    left, right = split_columns(acc, EPILOGUE)
    half: tl.constexpr = Q_TILE // EPILOGUE
    out_desc.store([expert, p_start, q_start], left.to(out_desc.dtype).reshape(1, P_TILE, half))
    if EPILOGUE == 2:
        out_desc.store([expert, p_start, q_start + half], right.to(out_desc.dtype).reshape(1, P_TILE, half))
