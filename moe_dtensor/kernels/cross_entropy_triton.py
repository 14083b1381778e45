"""Triton kernels of :mod:`.cross_entropy`: one reading of the logits forward, one reading and writing backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div

_BLOCK = 2048
_VECTOR = 8
"""Logits next to each other that share a running maximum: an exponential each, and one for the eight."""


def row_statistics(logits_TV: Tensor, columns: int, column_T: Tensor, here_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first ``columns`` of each row the maximum (a very low number where there are none) and the sum of the
    exponentials above it; and the target's logit, 0 where it is elsewhere."""
    made = [torch.empty(logits_TV.shape[0], dtype=torch.float32, device=logits_TV.device) for _ in range(3)]
    _row_statistics[(len(logits_TV),)](
        *(logits_TV, column_T, here_T, *made, logits_TV.stride(0), logits_TV.shape[1], columns),
        BLOCK=_BLOCK,
        VECTOR=_VECTOR,
    )
    return made[0], made[1], made[2]


def write_gradient(
    logits_TV: Tensor, columns: int, column_T: Tensor, here_T: Tensor, log_sum_T: Tensor, grad_T: Tensor, out_TV: Tensor
) -> None:
    """Write ``(softmax - one_hot) * grad``, 0 from ``columns`` on; ``out_TV`` may be ``logits_TV``."""
    tokens, width = logits_TV.shape
    _write_gradient[(tokens, ceil_div(width, _BLOCK))](
        *(logits_TV, column_T, here_T, log_sum_T, grad_T, out_TV),
        *(logits_TV.stride(0), out_TV.stride(0), width, columns),
        BLOCK=_BLOCK,
    )


@triton.jit
def _load(row_ptr, column, width, columns):
    """Logits in float32, -inf from ``columns`` on. The load is masked by ``width``, a multiple of 16 as a rule: by
    ``columns``, the size of a vocabulary, it would come number by number."""
    logits = tl.load(row_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
    return tl.where(column < columns, logits, float("-inf"))


@triton.jit
def _row_statistics(
    logits_ptr,
    column_ptr,
    here_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    stride,
    width,
    columns,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # A finite start: a row may be -inf throughout, and -inf less -inf is NaN.
    largest = tl.full((BLOCK // VECTOR,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        logits = _load(logits_ptr + row * stride, column, width, columns)
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        largest = higher
    row_max = tl.max(largest, axis=0)
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(largest - row_max), axis=0))
    here = tl.load(here_ptr + row)
    target = tl.load(logits_ptr + row * stride + tl.load(column_ptr + row), mask=here, other=0.0)
    tl.store(target_ptr + row, target.to(tl.float32))


@triton.jit
def _write_gradient(
    logits_ptr,
    column_ptr,
    here_ptr,
    log_sum_ptr,
    grad_ptr,
    out_ptr,
    stride,
    out_stride,
    width,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = _load(logits_ptr + row * stride, column, width, columns)
    softmax = tl.exp(logits - tl.load(log_sum_ptr + row))
    here = tl.load(here_ptr + row)
    hit = (column == tl.load(column_ptr + row)) & here
    grad = (softmax - tl.where(hit, 1.0, 0.0)) * tl.load(grad_ptr + row)
    tl.store(out_ptr + row * out_stride + column, grad.to(out_ptr.dtype.element_ty), mask=column < width)
