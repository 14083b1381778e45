"""Adding gradients up over microbatches in a wider dtype than they come in."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.kernels.library import launches_triton, triton_kernels

WORTH = 1 << 22
"""Elements from which on a kernel of ours saves more of the GPU's time than its launch takes of the host's."""


def widened(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``grad`` in ``dtype``."""
    if not _has_kernel(grad, dtype):
        return grad.to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    triton_kernels("accumulate").accumulate(out, grad, first=True)
    return out


def add_narrow(total: Tensor, grad: Tensor) -> None:
    """``total += grad``, computed in the dtype of ``total``. torch's own takes twice as long where dtypes differ."""
    if _has_kernel(grad, total.dtype) and total.is_contiguous():
        triton_kernels("accumulate").accumulate(total, grad, first=False)
    else:
        total += grad


def _has_kernel(grad: Tensor, dtype: torch.dtype) -> bool:
    narrow = grad.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    return launches_triton(grad) and narrow and grad.is_contiguous() and grad.numel() >= WORTH
