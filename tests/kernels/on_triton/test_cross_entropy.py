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


@pytest.mark.parametrize(("V", "vocab_size"), [(64, 51), (192, 131), (130, 60)])
def test_padding_does_not_exist(V, vocab_size, device, poisoned_memory, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "_BLOCK", 64)
    leaf_TV = torch.randn(5, V, device=device)
    leaf_TV[:, vocab_size:] = torch.nan
    leaf_TV.requires_grad_()
    labels_T = torch.randint(0, vocab_size, (5,), device=device)
    weight_T = torch.randn(5, device=device)
    loss_T = cross_entropy(leaf_TV * 1, labels_T, vocab_size=vocab_size)
    (got,) = torch.autograd.grad(loss_T, leaf_TV, weight_T)
    wide_TV = leaf_TV.detach()[:, :vocab_size].double().requires_grad_()
    expected_T = F.cross_entropy(wide_TV, labels_T, reduction="none")
    (expected,) = torch.autograd.grad(expected_T, wide_TV, weight_T.double())
    torch.testing.assert_close(loss_T.double(), expected_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, :vocab_size].double(), expected, atol=1e-5, rtol=1e-5)
    assert (got[:, vocab_size:] == 0).all()


def test_a_shard_of_padding_alone(device, poisoned_memory):
    leaf_TV = torch.randn(4, 32, device=device, requires_grad=True)
    labels_T = torch.tensor([40, 33, 2, 60], device=device)
    log_sum_T = torch.full((4,), 3.0, device=device)

    def all_reduce(t, op):
        if op == "max":
            assert (t < -1e30).all()
            return log_sum_T
        assert (t == 0).all()
        return torch.stack([log_sum_T, log_sum_T])

    loss_T = cross_entropy(leaf_TV * 1, labels_T, vocab_size=64, first_row=64, all_reduce=all_reduce)
    assert (torch.autograd.grad(loss_T.sum(), leaf_TV)[0] == 0).all()


def test_a_shard_without_the_target(device):
    logits_TV = torch.randn(4, 32, device=device)
    labels_T = torch.tensor([40, 33, 2, 70], device=device)
    parts = []
    cross_entropy(logits_TV, labels_T, first_row=32, all_reduce=lambda t, op: parts.append((op, t)) or t)
    target_T = torch.stack([logits_TV[0, 8], logits_TV[1, 1], logits_TV[2, 0] * 0, logits_TV[3, 0] * 0])
    torch.testing.assert_close(parts[1][1][1], target_T)
