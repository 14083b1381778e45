"""Triton kernels of :mod:`.sort`: a stable counting sort in two launches.

The first counts each chunk's copies of each expert, the second adds up the counts of the chunks before its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_BLOCK = 128
_MAX_CHUNKS = 512
"""Of a million copies each then has 16 blocks, which come one after the other, 4 us each."""
_ELEMENTS = 4096


def sort_by_expert(expert_TK: Tensor, first_expert: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches; see :func:`moe_dtensor.kernels.experts.sort.sort_by_expert`."""
    copies = expert_TK.numel()
    parts = ceil_div(copies, _BLOCK * _MAX_CHUNKS)
    chunks = ceil_div(copies, _BLOCK * parts)
    # One bin more than experts: that of copies without a row.
    bins = max(16, next_power_of_2(num_experts + 1))
    columns = min(next_power_of_2(chunks), max(1, _ELEMENTS // bins))
    position_TK = torch.empty_like(expert_TK, dtype=torch.int32)
    copy_N, ends_E = position_TK.new_empty(copies), position_TK.new_empty(num_experts)
    counts_EC = position_TK.new_empty(num_experts, chunks)
    sizes = (copies, first_expert, num_experts, chunks, parts)
    _count[(chunks,)](expert_TK, counts_EC, *sizes, BLOCK=_BLOCK, BINS=bins)
    _place[(chunks,)](
        expert_TK, counts_EC, position_TK, copy_N, ends_E, *sizes, BLOCK=_BLOCK, BINS=bins, COLUMNS=columns
    )
    return position_TK, copy_N, ends_E


@triton.jit
def _load_keys(expert_ptr, block, copies, first_expert, num_experts, BLOCK: tl.constexpr):
    """A block's local expert ids; ``num_experts`` stands for copies without a row and for the tail."""
    copy = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(expert_ptr + copy, mask=copy < copies, other=-1) - first_expert
    held = (key >= 0) & (key < num_experts) & (copy < copies)
    return copy, tl.where(held, key, num_experts).to(tl.int32), held


@triton.jit
def _count(
    expert_ptr,
    counts_ptr,
    copies,
    first_expert,
    num_experts,
    chunks,
    parts,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for part in range(parts):
        _, key, _ = _load_keys(expert_ptr, chunk * parts + part, copies, first_expert, num_experts, BLOCK)
        counts += tl.histogram(key, BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins * chunks + chunk, counts, mask=bins < num_experts)


@triton.jit
def _place(
    expert_ptr,
    counts_ptr,
    position_ptr,
    copy_ptr,
    ends_ptr,
    copies,
    first_expert,
    num_experts,
    chunks,
    parts,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for start in range(0, chunks, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (bins[:, None] < num_experts) & (column < chunks)
        counts = tl.load(counts_ptr + bins[:, None] * chunks + column, mask=inside, other=0)
        total += tl.sum(counts, axis=1)
        before += tl.sum(tl.where(column < chunk, counts, 0), axis=1)
    ends = tl.cumsum(total, axis=0)
    if chunk == 0:
        tl.store(ends_ptr + bins, ends, mask=bins < num_experts)
    lane = tl.arange(0, BLOCK)
    row_of_bin = ends - total + before
    for part in range(parts):
        copy, key, held = _load_keys(expert_ptr, chunk * parts + part, copies, first_expert, num_experts, BLOCK)
        earlier = tl.sum(((key[None, :] == key[:, None]) & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
        row = tl.gather(row_of_bin, key, 0) + earlier
        tl.store(position_ptr + copy, tl.where(held, row, -1), mask=copy < copies)
        tl.store(copy_ptr + row, copy, mask=held)
        row_of_bin += tl.histogram(key, BINS)
