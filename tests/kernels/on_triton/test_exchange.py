"""Gather with permute and unpermute with scatter, over ranks that are tensors of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_dtensor.kernels.experts import exchange_triton, permute_triton
from moe_dtensor.kernels.experts.permute import unpermute

R, K, ROWS = 3, 2, 40


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64, device=tensors[0].device)


def positions(tokens: int, seed: int, device: str) -> Tensor:
    """``(R * tokens, K)``: rows in any order, some choices held elsewhere."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=random)[: R * tokens * K].int().view(-1, K)
    return rows.where(torch.rand(rows.shape, generator=random) < 0.7, -1).to(device)


@pytest.mark.parametrize("width", [16, 2056])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gather_permute(tokens: int, width: int, device: str):
    """All ranks' tokens, in order, and their rows; no other row is written."""
    x_RTD = [torch.randn(tokens, width, device=device) for _ in range(R)]
    position_SK = positions(tokens, 1, device)
    all_SD, out_ND = torch.empty(R * tokens, width, device=device), torch.full((ROWS, width), 7.0, device=device)
    exchange_triton.gather_permute(addresses(x_RTD), position_SK, all_SD, out_ND)
    want_ND = torch.full((ROWS, width), 7.0, device=device)
    permute_triton.permute(torch.cat(x_RTD), position_SK, want_ND)
    assert torch.equal(all_SD, torch.cat(x_RTD))
    assert torch.equal(out_ND, want_ND)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_scatter(dtype: torch.dtype, gated: bool, device: str):
    """Every rank sends each token's sum to the rank whose token it is, where sums over ranks are made."""
    tokens, width = 5, 1032
    received = [torch.full((R, tokens, width), torch.nan, dtype=dtype, device=device) for _ in range(R)]
    sums_RSD = []
    for rank in range(R):
        position_SK = positions(tokens, rank, device)
        gate_SK = torch.rand(R * tokens, K, device=device) if gated else None
        y_ND = torch.randn(ROWS, width, device=device).to(dtype)
        exchange_triton.unpermute_scatter(y_ND, position_SK, gate_SK, addresses(received), rank)
        sums_RSD.append(unpermute(y_ND, position_SK, gate_SK))
    for rank in range(R):
        own = slice(rank * tokens, (rank + 1) * tokens)
        assert torch.equal(received[rank], torch.stack([sums_SD[own] for sums_SD in sums_RSD]))
        out_TD = torch.empty(tokens, width, dtype=dtype, device=device)
        exchange_triton.sum_ranks(received[rank], out_TD)
        want_TD = received[rank].float().sum(0).to(dtype)
        torch.testing.assert_close(out_TD, want_TD, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
