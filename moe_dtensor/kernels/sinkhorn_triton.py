"""Triton kernels of :mod:`.sinkhorn`: one launch an iteration, and one for the result.

The balanced matrix is ``L - r - c`` with a number per token and per expert. Each launch derives the columns' c from
what the launch before it summed up, block by block, then the rows' r, and sums up anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_ELEMENTS = 4096
_PROGRAMS = 132
"""One for each multiprocessor; two where there is much to do, for every program reads what all have summed up."""
_MANY = 8
"""Tiles for each of them that are much."""


def sinkhorn(logits_GTE: Tensor, iterations: int, log_share: float) -> Tensor:
    """See :func:`moe_dtensor.kernels.sinkhorn.sinkhorn`; float32, at least one iteration and one token."""
    groups, tokens, experts = logits_GTE.shape
    columns = max(16, next_power_of_2(experts))
    rows = max(1, _ELEMENTS // columns)
    tiles = ceil_div(tokens, rows)
    programs = _PROGRAMS * (2 if groups * tiles >= _MANY * _PROGRAMS else 1)
    blocks = min(tiles, max(1, programs // groups))
    sizes: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "TILES": ceil_div(tiles, blocks)}
    grid, numbers = (blocks, groups), (tokens, experts, blocks, log_share)
    row_GT = logits_GTE.new_empty(groups, tokens)
    old, new = (logits_GTE.new_empty(2, groups, blocks, experts).unbind() for _ in range(2))
    for i in range(iterations):
        _iterate[grid](logits_GTE, row_GT, *old, *new, *numbers, FIRST=i == 0, **sizes)
        old, new = new, old
    out_GTE = torch.empty_like(logits_GTE)
    _finish[grid](logits_GTE, row_GT, *old, out_GTE, *numbers, **sizes)
    return out_GTE


@triton.jit
def _column_terms(max_ptr, sum_ptr, group, blocks, experts, log_share, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """c of each expert: the logsumexp over the blocks' parts, less the share."""
    column = tl.arange(0, COLUMNS)
    largest = tl.full((COLUMNS,), -1.0e30, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    # Many blocks at a time: one after the other would wait for memory as many times.
    for start in range(0, blocks, PARTS):
        block = start + tl.arange(0, PARTS)[:, None]
        part = (group * blocks + block) * experts + column[None, :]
        inside = (block < blocks) & (column[None, :] < experts)
        part_max = tl.load(max_ptr + part, mask=inside, other=-1.0e30)
        part_sum = tl.load(sum_ptr + part, mask=inside, other=0.0)
        higher = tl.maximum(largest, tl.max(part_max, axis=0))
        added = tl.sum(part_sum * tl.exp(part_max - higher[None, :]), axis=0)
        total = total * tl.exp(largest - higher) + added
        largest = higher
    # Columns past E have no part, and their logits stay as far down as they were loaded.
    return tl.where(column < experts, largest + tl.log(tl.where(column < experts, total, 1.0)) - log_share, 0.0)


@triton.jit
def _iterate(
    logits_ptr,
    row_ptr,
    old_max_ptr,
    old_sum_ptr,
    new_max_ptr,
    new_sum_ptr,
    tokens,
    experts,
    blocks,
    log_share,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    block, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    if FIRST:
        c = tl.zeros((COLUMNS,), tl.float32)
    else:
        c = _column_terms(old_max_ptr, old_sum_ptr, group, blocks, experts, log_share, COLUMNS, ROWS)
    # A finite start: a block may hold no token, and -inf less -inf is NaN.
    largest = tl.full((COLUMNS,), -1.0e30, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(TILES):
        token = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (token[:, None] < tokens) & (column[None, :] < experts)
        offset = (group * tokens + token[:, None]).to(tl.int64) * experts + column[None, :]
        logits = tl.load(logits_ptr + offset, mask=inside, other=-1.0e30)
        shifted = logits - c[None, :]
        row_max = tl.max(shifted, axis=1)
        r = row_max + tl.log(tl.sum(tl.exp(shifted - row_max[:, None]), axis=1))
        tl.store(row_ptr + group * tokens + token, r, mask=token < tokens)
        scaled = tl.where(inside, logits - r[:, None], -1.0e30)
        higher = tl.maximum(largest, tl.max(scaled, axis=0))
        added = tl.sum(tl.where(inside, tl.exp(scaled - higher[None, :]), 0.0), axis=0)
        total = total * tl.exp(largest - higher) + added
        largest = higher
    part = (group * blocks + block) * experts + column
    tl.store(new_max_ptr + part, largest, mask=column < experts)
    tl.store(new_sum_ptr + part, total, mask=column < experts)


@triton.jit
def _finish(
    logits_ptr,
    row_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    tokens,
    experts,
    blocks,
    log_share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    block, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    c = _column_terms(max_ptr, sum_ptr, group, blocks, experts, log_share, COLUMNS, ROWS)
    for tile in range(TILES):
        token = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (token[:, None] < tokens) & (column[None, :] < experts)
        offset = (group * tokens + token[:, None]).to(tl.int64) * experts + column[None, :]
        logits = tl.load(logits_ptr + offset, mask=inside, other=0.0)
        r = tl.load(row_ptr + group * tokens + token, mask=token < tokens, other=0.0)
        tl.store(out_ptr + offset, logits - r[:, None] - c[None, :], mask=inside)
