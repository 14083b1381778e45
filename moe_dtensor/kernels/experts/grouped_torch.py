"""Grouped GEMMs by ``torch.nn.functional.grouped_mm``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
    """Nothing to precompute."""
    return ends_E.new_empty(0)


fake_tiles = make_tiles


def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.rows_times_weight`."""
    return F.grouped_mm(a_N, w_EPQ.transpose(1, 2) if transposed else w_EPQ, offs=ends_E)


def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.experts.grouped.weight_gradient`."""
    return F.grouped_mm(l_NP.T, r_NQ, offs=ends_E)
