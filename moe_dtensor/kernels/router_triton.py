"""Triton kernels of :mod:`.router`: a block of tokens holds all its scores in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div, next_power_of_2

_ELEMENTS = 2048


def top_k_gates(
    logits_TE: Tensor, ranking_TE: Tensor | None, top_k: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`moe_dtensor.kernels.router.top_k_gates`."""
    gate_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    expert_TK = torch.empty_like(gate_TK, dtype=torch.int64)
    tokens, experts = logits_TE.shape
    ranking_TE = None if ranking_TE is None else ranking_TE.contiguous()
    constants = _constants(experts, top_k, score, normalize)
    _top_k_kernel[(ceil_div(tokens, constants["ROWS"]),)](
        logits_TE, ranking_TE, gate_TK, expert_TK, tokens, experts, **constants, OWN_RANKING=ranking_TE is not None
    )
    return gate_TK, expert_TK


def _constants(experts: int, top_k: int, score: str, normalize: bool) -> dict[str, Any]:
    columns = max(16, next_power_of_2(experts))
    rows = max(1, min(64, _ELEMENTS // columns))
    return {"K": top_k, "ROWS": rows, "COLUMNS": columns, "SOFTMAX": score == "softmax", "NORMALIZE": normalize}


def gates_backward(dgate_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, score: str, normalize: bool) -> Tensor:
    """The gradient of the logits from the gates'."""
    dlogits_TE = torch.empty_like(logits_TE)
    tokens, experts = logits_TE.shape
    constants = _constants(experts, expert_TK.shape[1], score, normalize)
    _gates_backward_kernel[(ceil_div(tokens, constants["ROWS"]),)](
        dgate_TK, logits_TE, expert_TK, dlogits_TE, tokens, experts, **constants
    )
    return dlogits_TE


def split_halves(x_TE: Tensor, w_ED: Tensor) -> tuple[Tensor, Tensor]:
    """``[high | low]``, two numbers in the dtype of w whose sum is x, ``(T, 2 E)``; and w twice, ``(2 E, D)``."""
    halves_TC = w_ED.new_empty(x_TE.shape[0], 2 * x_TE.shape[1])
    twice_CD = w_ED.new_empty(2 * w_ED.shape[0], w_ED.shape[1])
    elements, weights, block = x_TE.numel(), w_ED.numel(), 1024
    _split_halves[(ceil_div(max(elements, 2 * weights), block),)](
        x_TE, w_ED, halves_TC, twice_CD, elements, x_TE.shape[1], weights, BLOCK=block
    )
    return halves_TC, twice_CD


@triton.jit
def _split_halves(x_ptr, w_ptr, halves_ptr, twice_ptr, elements, experts, weights, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < elements, other=0.0)
    high = x.to(halves_ptr.dtype.element_ty)
    low = (x - high.to(tl.float32)).to(halves_ptr.dtype.element_ty)
    half = halves_ptr + element + element // experts * experts
    tl.store(half, high, mask=element < elements)
    tl.store(half + experts, low, mask=element < elements)
    w = tl.load(w_ptr + element % weights, mask=element < 2 * weights)
    tl.store(twice_ptr + element, w, mask=element < 2 * weights)


@triton.jit
def _load_logits(logits_ptr, row, column, inside, experts):
    # Columns past E weigh nothing; rows past T are never stored, and 0 keeps them free of NaN.
    outside = tl.where(column < experts, 0.0, float("-inf"))
    return tl.load(logits_ptr + row * experts + column, mask=inside, other=outside)


@triton.jit
def _softmax(logits):
    powers = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    return powers / tl.sum(powers, axis=1, keep_dims=True)


@triton.jit
def _gates(logits, chosen, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr):
    """The score of every expert; with NORMALIZE that of the chosen ones over their sum, and 0 elsewhere."""
    if NORMALIZE:
        if not SOFTMAX:  # log sigmoid
            logits = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
        gates = _softmax(tl.where(chosen, logits, float("-inf")))
    elif SOFTMAX:
        gates = _softmax(logits)
    else:
        gates = tl.sigmoid(logits)
    return gates


@triton.jit
def _top_k_kernel(
    logits_ptr,
    ranking_ptr,
    gate_ptr,
    expert_ptr,
    tokens,
    experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OWN_RANKING: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = row_R[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < tokens) & (column < experts)
    logits = _load_logits(logits_ptr, row, column, inside, experts)
    ranking = logits
    if OWN_RANKING:
        ranking = tl.load(ranking_ptr + row * experts + column, mask=inside, other=float("-inf"))
    ranking = ranking.to(tl.float32)
    # Anything still to be had ranks above what is taken, NaN and -inf included: K different ids in any case.
    floor = -3.0e38
    ranking = tl.where(ranking > floor, ranking, floor)
    ranking = tl.where(column < experts, ranking, float("-inf"))
    choice = tl.full((ROWS, COLUMNS), K, tl.int32)
    for k in range(K):
        best = tl.argmax(ranking, axis=1, tie_break_left=True)
        tl.store(expert_ptr + row_R * K + k, best.to(tl.int64), mask=row_R < tokens)
        here = column == best[:, None]
        choice = tl.where(here, k, choice)
        ranking = tl.where(here, float("-inf"), ranking)
    gates = _gates(logits, choice < K, SOFTMAX, NORMALIZE)
    for k in range(K):
        gate = tl.sum(tl.where(choice == k, gates, 0.0), axis=1)
        tl.store(gate_ptr + row_R * K + k, gate, mask=row_R < tokens)


@triton.jit
def _gates_backward_kernel(
    dgate_ptr,
    logits_ptr,
    expert_ptr,
    dlogits_ptr,
    tokens,
    experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = row_R[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < tokens) & (column < experts)
    logits = _load_logits(logits_ptr, row, column, inside, experts)
    dgates = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Rows past T have chosen column 0, which keeps them free of NaN.
    chosen = (column == 0) & (row >= tokens)
    for k in range(K):
        expert = tl.load(expert_ptr + row_R * K + k, mask=row_R < tokens, other=-1)
        dgate = tl.load(dgate_ptr + row_R * K + k, mask=row_R < tokens, other=0.0)
        here = column == expert[:, None]
        dgates += tl.where(here, dgate[:, None], 0.0)
        chosen = chosen | here
    gates = _gates(logits, chosen, SOFTMAX, NORMALIZE)
    if SOFTMAX or NORMALIZE:
        dlogits = gates * (dgates - tl.sum(gates * dgates, axis=1, keep_dims=True))
        if not SOFTMAX:
            dlogits *= tl.sigmoid(-logits)
    else:
        dlogits = dgates * gates * (1.0 - gates)
    tl.store(dlogits_ptr + row * experts + column, dlogits, mask=inside)


_ELEMENTS = 2048


def router_statistics(logits_TE: Tensor, gate_TK: Tensor) -> Tensor:
    """See :func:`moe_dtensor.kernels.router.router_statistics`; at least one token, not float64."""
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
