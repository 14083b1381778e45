"""Gather with permute and unpermute with scatter, over ranks that are tensors of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_dtensor.kernels.experts import exchange_triton, permute_triton
from moe_dtensor.kernels.experts.permute import unpermute

R, K, ROWS = 3, 2, 40


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)


def positions(tokens: int, seed: int) -> Tensor:
    """``(R * tokens, K)``: rows in any order, some choices held elsewhere."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=random)[: R * tokens * K].int().view(-1, K)
    return rows.where(torch.rand(rows.shape, generator=random) < 0.7, -1)


@pytest.mark.parametrize("width", [16, 2056])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gather_permute(tokens: int, width: int):
    """All ranks' tokens, in order, and their rows; no other row is written."""
    x_RTD = [torch.randn(tokens, width) for _ in range(R)]
    position_SK = positions(tokens, seed=1)
    all_SD, out_ND = torch.empty(R * tokens, width), torch.full((ROWS, width), 7.0)
    exchange_triton.gather_permute(addresses(x_RTD), position_SK, all_SD, out_ND)
    want_ND = torch.full((ROWS, width), 7.0)
    permute_triton.permute(torch.cat(x_RTD), position_SK, want_ND)
    assert torch.equal(all_SD, torch.cat(x_RTD))
    assert torch.equal(out_ND, want_ND)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_scatter(dtype: torch.dtype, gated: bool):
    """Every rank sends each token's sum to the rank whose token it is, where sums over ranks are made."""
    tokens, width = 5, 1032
    received = [torch.full((R, tokens, width), torch.nan, dtype=dtype) for _ in range(R)]
    sums_RSD = []
    for rank in range(R):
        position_SK, gate_SK = positions(tokens, seed=rank), torch.rand(R * tokens, K) if gated else None
        y_ND = torch.randn(ROWS, width).to(dtype)
        exchange_triton.unpermute_scatter(y_ND, position_SK, gate_SK, addresses(received), rank)
        sums_RSD.append(unpermute(y_ND, position_SK, gate_SK))
    for rank in range(R):
        own = slice(rank * tokens, (rank + 1) * tokens)
        assert torch.equal(received[rank], torch.stack([sums_SD[own] for sums_SD in sums_RSD]))
        out_TD = torch.empty(tokens, width, dtype=dtype)
        exchange_triton.sum_ranks(received[rank], out_TD)
        want_TD = received[rank].float().sum(0).to(dtype)
        torch.testing.assert_close(out_TD, want_TD, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
