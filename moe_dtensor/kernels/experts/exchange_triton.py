"""Triton kernels of :mod:`.exchange`. Of the ranks' tokens one of each is taken in turn, so that links and memory are
busy at the same time. R ranks, T tokens of each, D width, K choices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.experts.permute_triton import sum_rows, write_rows
from moe_dtensor.kernels.library import ceil_div, next_power_of_2


def gather_permute(addresses_R: Tensor, position_SK: Tensor, all_SD: Tensor, out_ND: Tensor) -> None:
    """Write the tokens that lie ``(T, D)`` at each rank's address to ``all_SD``, and to their rows in ``out_ND``."""
    (tokens, width), ranks = all_SD.shape, len(addresses_R)
    block = min(2048, next_power_of_2(width))
    _gather_permute[(tokens, ceil_div(width, block))](
        addresses_R, position_SK, all_SD, out_ND, tokens // ranks, width, ranks, K=position_SK.shape[1], BLOCK=block
    )


def unpermute_scatter(
    y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None, addresses_R: Tensor, rank: int
) -> None:
    """Write each token's sum of rows to where its rank has room for what ``rank`` sends: ``(R, T, D)`` at its
    address."""
    (tokens, choices), width, ranks = position_SK.shape, y_ND.shape[1], len(addresses_R)
    block = min(1024, next_power_of_2(width))
    gate_SK = None if gate_SK is None else gate_SK.contiguous()
    _unpermute_scatter[(tokens, ceil_div(width, block))](
        *(y_ND, position_SK, gate_SK, addresses_R, rank, tokens // ranks, width, ranks),
        K=choices,
        BLOCK=block,
        HAS_GATE=gate_SK is not None,
    )


def sum_ranks(received_RTD: Tensor, out_TD: Tensor) -> None:
    """Write the sum over ranks, in their order."""
    size = out_TD.numel()
    _sum_ranks[(ceil_div(size, 2048),)](received_RTD, out_TD, size, RANKS=len(received_RTD), BLOCK=2048)


@triton.jit
def _gather_permute(
    addresses_ptr,
    position_ptr,
    all_ptr,
    out_ptr,
    tokens,
    width,
    ranks,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner = tl.program_id(0) % ranks
    own_token = (tl.program_id(0) // ranks).to(tl.int64)
    token = owner * tokens + own_token
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr = tl.load(addresses_ptr + owner).to(tl.pointer_type(out_ptr.dtype.element_ty))
    x = tl.load(x_ptr + own_token * width + column, mask=inside)
    tl.store(all_ptr + token * width + column, x, mask=inside)
    write_rows(out_ptr, x, position_ptr, token, column, inside, width, K)


@triton.jit
def _unpermute_scatter(
    y_ptr,
    position_ptr,
    gate_ptr,
    addresses_ptr,
    rank,
    tokens,
    width,
    ranks,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    owner = tl.program_id(0) % ranks
    own_token = (tl.program_id(0) // ranks).to(tl.int64)
    token = owner * tokens + own_token
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = sum_rows(y_ptr, position_ptr, gate_ptr, token, column, inside, width, K, BLOCK, HAS_GATE)
    out_ptr = tl.load(addresses_ptr + owner).to(tl.pointer_type(y_ptr.dtype.element_ty))
    place = (own_token + rank * tokens) * width + column
    tl.store(out_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_ranks(received_ptr, out_ptr, size, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(RANKS):
        total += tl.load(received_ptr + place, mask=inside, other=0.0).to(tl.float32)
        received_ptr += size
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
