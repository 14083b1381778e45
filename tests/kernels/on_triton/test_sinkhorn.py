"""Sinkhorn's kernels against the loop in float64."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels import sinkhorn_triton
from moe_dtensor.kernels.sinkhorn import sinkhorn


@pytest.mark.parametrize("shape", [(1, 70, 3), (2, 64, 8), (5, 3, 130), (300, 16), (2, 40, 512)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_equals_the_loop(shape, iterations, device, poisoned_memory):
    torch.manual_seed(0)
    logits = 4 * torch.randn(shape, device=device)
    got = sinkhorn(logits, iterations)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), sinkhorn(logits.double(), iterations), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("many", [1, 100], ids=["two programs for each multiprocessor", "one"])
def test_programs_that_take_several_tiles(many, device, monkeypatch, poisoned_memory):
    monkeypatch.setattr(sinkhorn_triton, "_ELEMENTS", 64)
    monkeypatch.setattr(sinkhorn_triton, "_PROGRAMS", 4)
    monkeypatch.setattr(sinkhorn_triton, "_MANY", many)
    torch.manual_seed(0)
    logits = 4 * torch.randn(2, 131, 8, device=device)
    expected = sinkhorn(logits.double(), 3)
    torch.testing.assert_close(sinkhorn(logits, 3).double(), expected, atol=1e-4, rtol=1e-5)


def test_large_logits_do_not_overflow(device):
    got = sinkhorn(3000 * torch.randn(64, 8, device=device), 8)
    torch.testing.assert_close(got.exp().sum(0), torch.full((8,), 8.0, device=device), atol=1e-2, rtol=1e-2)
