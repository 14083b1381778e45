"""Triton kernels of :mod:`.routing`: a stable counting sort in two passes over blocks of copies."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, ceil_div, next_power_of_2

_BLOCK = 128


def sort_by_expert(expert_TK: Tensor, first_expert: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches and one prefix sum; see :func:`moe_dtensor.kernels.routing.sort_by_expert`."""
    copies = expert_TK.numel()
    blocks = ceil_div(copies, _BLOCK)
    count, place = _launchers(expert_TK.get_device(), copies, first_expert, num_experts)
    position_TK = torch.empty_like(expert_TK, dtype=torch.int32)
    copy_N, ends_E = position_TK.new_empty(copies), position_TK.new_empty(num_experts)
    # Expert-major, so that one inclusive prefix sum over all of it ends at each (expert, block)'s last row.
    counts_EB = position_TK.new_empty(num_experts, blocks)
    count(expert_TK, counts_EB)
    last_EB = counts_EB.view(-1).cumsum(0, dtype=torch.int32)
    place(expert_TK, last_EB, position_TK, copy_N, ends_E)
    return position_TK, copy_N, ends_E


@lru_cache
def _launchers(device: int, copies: int, first_expert: int, num_experts: int) -> tuple[Launcher, Launcher]:
    blocks = ceil_div(copies, _BLOCK)
    numbers = (copies, first_expert, num_experts, blocks)
    bins = max(16, next_power_of_2(num_experts + 1))
    count = Launcher(_count, (blocks,), numbers, BLOCK=_BLOCK, BINS=bins)
    return count, Launcher(_place, (blocks,), numbers, BLOCK=_BLOCK)


@triton.jit
def _load_keys(expert_ptr, block, copies, first_expert, num_experts, BLOCK: tl.constexpr):
    """A block's local expert ids; ``num_experts`` stands for copies held elsewhere and for the tail."""
    copy = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(expert_ptr + copy, mask=copy < copies, other=-1) - first_expert
    held = (key >= 0) & (key < num_experts) & (copy < copies)
    return copy, tl.where(held, key, num_experts).to(tl.int32), held


@triton.jit
def _count(expert_ptr, counts_ptr, copies, first_expert, num_experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    _, key, _ = _load_keys(expert_ptr, block, copies, first_expert, num_experts, BLOCK)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins * blocks + block, tl.histogram(key, BINS), mask=bins < num_experts)


@triton.jit
def _place(
    expert_ptr,
    last_ptr,
    position_ptr,
    copy_ptr,
    ends_ptr,
    copies,
    first_expert,
    num_experts,
    blocks,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    copy, key, held = _load_keys(expert_ptr, block, copies, first_expert, num_experts, BLOCK)
    lane = tl.arange(0, BLOCK)
    # Rows of this expert in this block that come after: counting back from the block's last row needs no count.
    after = tl.sum(((key[None, :] == key[:, None]) & (lane[None, :] > lane[:, None])).to(tl.int32), axis=1)
    last = tl.load(last_ptr + key * blocks + block, mask=held, other=0)
    row = last - 1 - after
    tl.store(position_ptr + copy, tl.where(held, row, -1), mask=copy < copies)
    tl.store(copy_ptr + row, copy, mask=held)
    # The last block knows every expert's end.
    if block == blocks - 1:
        for expert in range(num_experts):
            tl.store(ends_ptr + expert, tl.load(last_ptr + expert * blocks + block))
