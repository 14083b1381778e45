"""Triton kernel of :mod:`.accumulate`, bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div

_BLOCK = 4096


def accumulate(total: Tensor, grad: Tensor, first: bool) -> None:
    """``total = grad`` if it is the first, else ``total += grad``; both contiguous."""
    elements = grad.numel()
    _accumulate[(ceil_div(elements, _BLOCK),)](total, grad, elements, FIRST=first, BLOCK=_BLOCK)


@triton.jit
def _accumulate(total_ptr, grad_ptr, elements, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    grad = tl.load(grad_ptr + place, mask=inside).to(total_ptr.dtype.element_ty)
    if not FIRST:
        grad += tl.load(total_ptr + place, mask=inside)
    tl.store(total_ptr + place, grad, mask=inside)
