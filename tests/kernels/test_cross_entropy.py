from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from moe_dtensor.kernels import cross_entropy as module
from moe_dtensor.kernels.cross_entropy import cross_entropy


@pytest.fixture
def labels_T():
    return torch.tensor([3, 0, -100, 12, 7, -100, 1])


def test_leaf_logits_pass_gradcheck(labels_T):
    logits_TV = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda logits: cross_entropy(logits, labels_T), logits_TV)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_pytorch_in_small_blocks(dtype, labels_T, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 26)
    torch.manual_seed(0)
    x_TD, w_VD = torch.randn(7, 4, dtype=dtype), torch.randn(13, 4, dtype=dtype, requires_grad=True)
    loss_T = cross_entropy(x_TD @ w_VD.T, labels_T)
    wide = torch.promote_types(dtype, torch.float32)
    expected_T = F.cross_entropy((x_TD @ w_VD.T).to(wide), labels_T, reduction="none")
    torch.testing.assert_close(loss_T, expected_T)
    (got,) = torch.autograd.grad(loss_T.sum(), w_VD)
    (expected,) = torch.autograd.grad(expected_T.sum(), w_VD)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_padding_does_not_exist(labels_T, in_place, monkeypatch):
    """Padded columns once took part in the softmax: 131 ids in 192 columns of zeros added 0.379 to the loss."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 26)
    leaf_TV = torch.randn(7, 16, dtype=torch.float64)
    leaf_TV[:, 13:] = torch.tensor([50.0, torch.inf, torch.nan])
    leaf_TV.requires_grad_()
    loss_T = cross_entropy(leaf_TV * 1 if in_place else leaf_TV, labels_T, vocab_size=13)
    real_TV = leaf_TV.detach()[:, :13].clone().requires_grad_()
    expected_T = F.cross_entropy(real_TV, labels_T, reduction="none")
    torch.testing.assert_close(loss_T, expected_T)
    (got,) = torch.autograd.grad(loss_T.sum(), leaf_TV)
    (expected,) = torch.autograd.grad(expected_T.sum(), real_TV)
    torch.testing.assert_close(got[:, :13], expected)
    assert (got[:, 13:] == 0).all()


def test_a_shard_of_padding_alone(labels_T):
    leaf_TV = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    whole_T = torch.full((7,), 2.0, dtype=torch.float64)
    parts = {}

    def all_reduce(t, op):
        parts[op] = t.clone()
        return whole_T if op == "max" else torch.stack([whole_T, whole_T])

    loss_T = cross_entropy(leaf_TV, labels_T, vocab_size=13, first_row=16, all_reduce=all_reduce)
    assert (parts["max"] == -torch.inf).all()
    assert (parts["sum"] == 0).all()
    assert (torch.autograd.grad(loss_T.sum(), leaf_TV)[0] == 0).all()


def test_shards_add_up_to_the_whole(labels_T):
    """Two shards, by a stand-in for the collective that knows both shards' parts."""
    torch.manual_seed(0)
    logits_TV = torch.randn(7, 14, dtype=torch.float64)
    expected_T = F.cross_entropy(logits_TV, labels_T, reduction="none")
    shards = logits_TV.split([8, 6], 1)
    parts: dict[str, list[torch.Tensor]] = {"max": [], "sum": []}

    def record(t, op):
        parts[op].append(t.clone())
        return t

    # The maxima first; with them known, each shard's sums; with those known, the loss.
    for first_row, shard in zip((0, 8), shards, strict=True):
        cross_entropy(shard, labels_T, first_row=first_row, all_reduce=record)
    largest = torch.stack(parts["max"]).amax(0)
    parts["sum"].clear()

    def with_maximum(t, op):
        return largest if op == "max" else record(t, op)

    for first_row, shard in zip((0, 8), shards, strict=True):
        cross_entropy(shard, labels_T, first_row=first_row, all_reduce=with_maximum)
    total = torch.stack(parts["sum"]).sum(0)
    for first_row, shard in zip((0, 8), shards, strict=True):
        leaf = shard.clone().requires_grad_()
        loss_T = cross_entropy(
            leaf, labels_T, first_row=first_row, all_reduce=lambda t, op: largest if op == "max" else total
        )
        torch.testing.assert_close(loss_T, expected_T)
        whole = logits_TV.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(whole, labels_T, reduction="sum"), whole)
        (got,) = torch.autograd.grad(loss_T.sum(), leaf)
        torch.testing.assert_close(got, expected[:, first_row : first_row + shard.shape[1]])


def test_gradient_is_written_over_the_logits(labels_T):
    w_VD = torch.randn(13, 4, dtype=torch.bfloat16, requires_grad=True)
    logits_TV = torch.randn(7, 4, dtype=torch.bfloat16) @ w_VD.T
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_T = cross_entropy(logits_TV, labels_T)
    assert all(t.numel() <= 7 or t.dtype == torch.bfloat16 for t in kept)
    before = logits_TV.detach().clone()
    loss_T.sum().backward()
    assert not torch.equal(logits_TV.detach(), before)
