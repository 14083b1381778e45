"""Our own grouped GEMMs: which tiles, how many programs, what is launched. The kernels are in :mod:`.gemm_triton`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dtensor.kernels.experts.gemm_triton import make_tiles_kernel, rows_kernel, weight_kernel
from moe_dtensor.kernels.launch import describe, describe_ragged, next_power_of_2

ROW_TILE = 128
# An expert's weight above this many bytes does not stay in the L2 cache while one row tile sweeps over it.
_L2_BYTES = 24 << 20
_WEIGHT_GROUP = 4


class Tile(NamedTuple):
    """One configuration of a GEMM kernel. ``m`` is ROW_TILE for rows; see ``gemm_triton`` for the rest."""

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
def _num_programs(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 3


def _max_row_tiles(rows: int, num_experts: int) -> int:
    # Every expert may end in a part of a tile.
    return rows // ROW_TILE + num_experts


def fake_plan(ends_E: Tensor, rows: int) -> Tensor:
    """The tile table's shape: the number of row tiles, then (expert, first row) of each."""
    return ends_E.new_empty(1 + 2 * _max_row_tiles(rows, ends_E.shape[0]))


def plan(ends_E: Tensor, rows: int) -> Tensor:
    """Cut each expert's rows into tiles of ROW_TILE, on the device."""
    table = fake_plan(ends_E, rows)
    experts = len(ends_E)
    bins = max(2, next_power_of_2(experts))
    make_tiles_kernel[(experts,)](
        ends_E, table, experts, _max_row_tiles(rows, experts), ROW_TILE=ROW_TILE, EXPERTS=bins, BLOCK=64
    )
    return table


def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, plan: Tensor, transposed: bool) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.rows_times_weight`."""
    rows, inner = a_N.shape
    experts, p, q = w_EPQ.shape
    columns = p if transposed else q
    out_N = a_N.new_empty(rows, columns)
    tile, programs = choose_tile(a_N.dtype, columns), _num_programs(a_N.get_device())
    rows_kernel[(programs,)](
        describe(a_N, [ROW_TILE, tile.k]),
        describe(w_EPQ, [1, tile.n, tile.k] if transposed else [1, tile.k, tile.n]),
        describe_ragged(out_N, [ROW_TILE, tile.n // tile.epilogue]),
        ends_E,
        plan,
        _max_row_tiles(rows, experts),
        columns,
        inner,
        TRANSPOSED=transposed,
        GROUP=choose_group(p * q * a_N.dtype.itemsize),
        ROW_TILE=ROW_TILE,
        COLUMN_TILE=tile.n,
        INNER_TILE=tile.k,
        EPILOGUE=tile.epilogue,
        PROGRAMS=programs,
        PRECISION=_precision(a_N.dtype),
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out_N


def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, plan: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.weight_gradient`."""
    experts, p, q = ends_E.shape[0], l_NP.shape[1], r_NQ.shape[1]
    out_EPQ = l_NP.new_empty(experts, p, q)
    tile, programs = choose_tile(l_NP.dtype, q), _num_programs(l_NP.get_device())
    weight_kernel[(programs,)](
        describe_ragged(l_NP, [tile.k, tile.m]),
        describe_ragged(r_NQ, [tile.k, tile.n]),
        describe(out_EPQ, [1, tile.m, tile.n // tile.epilogue]),
        ends_E,
        experts,
        p,
        q,
        P_TILE=tile.m,
        Q_TILE=tile.n,
        ROWS_TILE=tile.k,
        EPILOGUE=tile.epilogue,
        GROUP=_WEIGHT_GROUP,
        PROGRAMS=programs,
        PRECISION=_precision(l_NP.dtype),
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out_EPQ


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
