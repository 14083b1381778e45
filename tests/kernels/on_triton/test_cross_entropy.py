"""Cross-entropy's kernels against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_dtensor.kernels import cross_entropy_triton
from moe_dtensor.kernels.cross_entropy import cross_entropy


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("V", [13, 64, 200])
def test_equals_pytorch(V, in_place, device, poisoned_memory, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "_BLOCK", 64)
    torch.manual_seed(0)
    leaf_TV = (5 * torch.randn(9, V)).to(device).requires_grad_()
    labels_T = torch.randint(0, V, (9,), device=device)
    labels_T[3] = -100
    logits_TV = leaf_TV * 1 if in_place else leaf_TV
    weight_T = torch.randn(9, device=device)
    loss_T = cross_entropy(logits_TV, labels_T)
    (got,) = torch.autograd.grad(loss_T, leaf_TV, weight_T)
    wide_TV = leaf_TV.detach().double().requires_grad_()
    expected_T = F.cross_entropy(wide_TV, labels_T, reduction="none")
    (expected,) = torch.autograd.grad(expected_T, wide_TV, weight_T.double())
    torch.testing.assert_close(loss_T.double(), expected_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_shard_without_the_target(device):
    logits_TV = torch.randn(4, 32, device=device)
    labels_T = torch.tensor([40, 33, 2, 70], device=device)
    parts = []
    cross_entropy(logits_TV, labels_T, first_row=32, all_reduce=lambda t, op: parts.append((op, t)) or t)
    target_T = torch.stack([logits_TV[0, 8], logits_TV[1, 1], logits_TV[2, 0] * 0, logits_TV[3, 0] * 0])
    torch.testing.assert_close(parts[1][1][1], target_T)
