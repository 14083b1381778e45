"""Persistent grouped GEMM kernels: bulk tensor loads (TMA), tensor cores, one program per multiprocessor.

Rows are sorted by expert, and an expert's rows begin anywhere, so a tile of rows may reach into the next expert's. The
extra rows are computed and not stored: ``triton.tools.ragged_tma`` clips a store (and zero-fills a load) at the
expert's end in hardware, which a branch could not do without ending the loop's software pipeline.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices


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
def _split_columns(acc, PARTS: tl.constexpr):
    """The left and right half of a tile (both the same if it is not split)."""
    if PARTS == 1:
        left = acc
        right = acc
    else:
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def _store_ragged(desc, begin, size, column, tile):
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
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
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
        left, right = _split_columns(acc, EPILOGUE)
        _store_ragged(out_desc, row, end - row, column, left.to(out_desc.dtype))
        if EPILOGUE == 2:
            _store_ragged(out_desc, row, end - row, column + COLUMN_TILE // 2, right.to(out_desc.dtype))


@triton.jit
def weight_kernel(
    l_desc,
    r_desc,
    out_desc,
    ends_ptr,
    experts,
    p,
    q,
    P_TILE: tl.constexpr,
    Q_TILE: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[e] = l[rows of e]^T @ r[rows of e]``; zeros for an expert with no row."""
    p_tiles = tl.cdiv(p, P_TILE)
    q_tiles = tl.cdiv(q, Q_TILE)
    for tile in tl.range(tl.program_id(0), experts * p_tiles * q_tiles, PROGRAMS):
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
        left, right = _split_columns(acc, EPILOGUE)
        half: tl.constexpr = Q_TILE // EPILOGUE
        out_desc.store([expert, p_start, q_start], left.to(out_desc.dtype).reshape(1, P_TILE, half))
        if EPILOGUE == 2:
            out_desc.store([expert, p_start, q_start + half], right.to(out_desc.dtype).reshape(1, P_TILE, half))
