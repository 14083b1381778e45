"""Grouped GEMMs by ``torch.nn.functional.grouped_mm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped import check_alignment

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(x_TD: Tensor, w_up_EGFD: Tensor) -> None:
    """Raise ValueError for dtypes and sizes that ``grouped_mm`` does not take."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError("moe.backend = torch needs torch.nn.functional.grouped_mm: install torch >= 2.11.")
    if x_TD.dtype not in _DTYPES:
        raise ValueError(
            f"moe.backend = torch takes bfloat16, float16 and float32, not {x_TD.dtype}. Set moe.backend = reference."
        )
    check_alignment("torch", w_up_EGFD.shape[3], w_up_EGFD.shape[2], x_TD.dtype.itemsize)


def plan(ends_E: Tensor, rows: int) -> Tensor:
    """Nothing to precompute."""
    return ends_E.new_empty(0)


fake_plan = plan


def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, plan: Tensor, transposed: bool) -> Tensor:
    """See :data:`moe_dtensor.kernels.grouped.rows_times_weight`."""
    return F.grouped_mm(a_N, w_EPQ.transpose(1, 2) if transposed else w_EPQ, offs=ends_E)


def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, plan: Tensor) -> Tensor:
    """See :data:`moe_dtensor.kernels.grouped.weight_gradient`."""
    return F.grouped_mm(l_NP.T, r_NQ, offs=ends_E)
