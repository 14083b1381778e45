"""What the package grouped_gemm is asked for, by a stand-in with the signature of ``grouped_gemm.backend.gmm``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from moe_dtensor.kernels.experts.grouped import ByPackage, ByTorch

COUNTS = [3, 0, 5, 0]


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """One product for each expert; like the package's, it takes counts on the host that add up to the rows."""
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert a.shape[0] == int(batch_sizes.sum())
    assert a.is_contiguous()
    assert b.is_contiguous()
    experts = zip(a.split(batch_sizes.tolist()), b.split(batch_sizes.tolist()) if trans_a else b, strict=True)
    made = [x.T @ y if trans_a else x @ (y.T if trans_b else y) for x, y in experts]
    if not trans_a:
        return torch.cat(made, out=c)
    for product, count in zip(made, batch_sizes.tolist(), strict=True):
        if count == 0:
            product.fill_(torch.nan)
    return torch.stack(made)


@pytest.mark.parametrize("rows", [8, 11])
def test_products_and_weight_gradients(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "grouped_gemm.backend", SimpleNamespace(gmm=gmm))
    torch.manual_seed(0)
    ends_E = torch.tensor(COUNTS).cumsum(0).int()
    plan = ByPackage.make_tiles(ends_E, rows)
    assert plan.tolist() == COUNTS
    l_NP, r_NQ, w_EPQ = torch.randn(rows, 16), torch.randn(rows, 8), torch.randn(4, 16, 8)
    for a, transposed in ((l_NP, False), (r_NQ, True)):
        got, expected = (
            backend.rows_times_weight(a, w_EPQ, ends_E, plan, transposed) for backend in (ByPackage, ByTorch)
        )
        assert got.shape == expected.shape
        torch.testing.assert_close(got[:8], expected[:8])
    got, expected = (backend.weight_gradient(l_NP, r_NQ, ends_E, plan) for backend in (ByPackage, ByTorch))
    torch.testing.assert_close(got, expected)
