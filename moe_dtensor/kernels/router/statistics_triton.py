"""Triton kernel of :mod:`.statistics`: each program sums up a block of tokens, and one more sum adds the blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.launch import ceil_div, next_power_of_2

_ELEMENTS = 2048


def router_statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    """See :func:`moe_dtensor.kernels.router.statistics.router_statistics`; at least one token, not float64."""
    (tokens, experts), choices = logits_TE.shape, gate_TK.shape[1]
    columns = max(16, next_power_of_2(experts))
    rows = max(1, min(64, _ELEMENTS // columns))
    blocks = ceil_div(tokens, rows)
    parts = torch.empty(4, blocks, dtype=torch.float32, device=logits_TE.device)
    numbers = (tokens, experts, choices, blocks)
    _statistics_kernel[(blocks,)](
        logits_TE, gate_TK, parts, *numbers, ROWS=rows, COLUMNS=columns, CHOICES=next_power_of_2(choices)
    )
    return parts.sum(1)


@triton.jit
def _store_sum(parts_ptr, which, blocks, value_R, held_R):
    tl.store(parts_ptr + which * blocks + tl.program_id(0), tl.sum(tl.where(held_R, value_R, 0.0), axis=0))


@triton.jit
def _statistics_kernel(
    logits_ptr,
    gate_ptr,
    parts_ptr,
    tokens,
    experts,
    choices,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    held = row_R < tokens
    row = row_R[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = held[:, None] & (column < experts)
    # Columns past E weigh nothing; rows past T are not summed, and 0 keeps them free of NaN.
    outside = tl.where(column < experts, 0.0, float("-inf"))
    logits = tl.load(logits_ptr + row * experts + column, mask=inside, other=outside).to(tl.float32)
    largest = tl.max(logits, axis=1)
    shifted = logits - largest[:, None]
    powers = tl.exp(shifted)
    total = tl.sum(powers, axis=1)
    log_total = tl.log(total)
    # 0 times -inf is NaN, where a probability of 0 has no entropy.
    entropy = log_total - tl.sum(powers * tl.where(powers > 0.0, shifted, 0.0), axis=1) / total
    best = tl.argmax(logits, axis=1)
    second = tl.max(tl.where(column == best[:, None], 0.0, powers), axis=1)
    choice = tl.arange(0, CHOICES)[None, :]
    gate_inside = held[:, None] & (choice < choices)
    gate = tl.load(gate_ptr + row * choices + choice, mask=gate_inside, other=0.0).to(tl.float32)
    logsumexp = largest + log_total
    _store_sum(parts_ptr, 0, blocks, entropy, held)
    _store_sum(parts_ptr, 1, blocks, (1.0 - second) / total, held)
    _store_sum(parts_ptr, 2, blocks, tl.sqrt(tl.sum(gate * gate, axis=1)), held)
    _store_sum(parts_ptr, 3, blocks, logsumexp * logsumexp, held)
