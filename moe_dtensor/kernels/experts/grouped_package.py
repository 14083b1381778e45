"""Grouped GEMMs by the PyPI package ``grouped_gemm`` (CUDA, bf16; counts per expert on the host: one sync a layer)."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


def _backend() -> ModuleType:
    try:
        return importlib.import_module("grouped_gemm.backend")
    except ImportError as error:
        raise ValueError(
            "moe.backend = grouped_gemm needs the package grouped_gemm, which is not installed. On a machine with the "
            "CUDA toolkit run `pip install --no-build-isolation 'moe_dtensor[grouped_gemm]'` (nv-grouped-gemm serves "
            "too, and builds on CUDA 13), or set moe.backend = torch."
        ) from error


def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
    """Rows of each expert, int64, on the host (a sync)."""
    ends = ends_E.cpu().long()
    return torch.diff(ends, prepend=ends.new_zeros(1))


def fake_tiles(ends_E: Tensor, rows: int) -> Tensor:
    """For tracing."""
    return torch.empty(ends_E.shape, dtype=torch.int64, device="cpu")


def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.rows_times_weight`."""
    out_N = a_N.new_empty(a_N.shape[0], w_EPQ.shape[1 if transposed else 2])
    # The package wants as many rows as the counts add up to; ours may be more.
    held = int(tiles.sum())
    _backend().gmm(a_N[:held], w_EPQ, tiles, trans_a=False, trans_b=transposed, c=out_N[:held])
    return out_N


def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.weight_gradient`."""
    held = int(tiles.sum())
    out_EPQ = _backend().gmm(l_NP[:held], r_NQ[:held], tiles, trans_a=True, trans_b=False)
    # One product for each expert: nothing promises that one over no rows writes zeros.
    for expert in (tiles == 0).nonzero().flatten().tolist():
        out_EPQ[expert].zero_()
    return out_EPQ
