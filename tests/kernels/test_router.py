from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.router import router_logits, top_k_gates
from moe_dtensor.kernels.sinkhorn import sinkhorn

from .router_cases import CASES, check_gates, check_tiny_scores


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize(("T", "E", "K", "score", "normalize"), [*CASES, (0, 4, 2, "softmax", True)])
def test_gates_and_choice(T, E, K, score, normalize, ranked):
    check_gates(T, E, K, score, normalize, ranked, "cpu")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_normalised_gates_of_tiny_scores(score):
    check_tiny_scores(score, "cpu")


def test_choices_are_distinct_ids_whatever_the_logits():
    """NaN or infinite logits once led to repeated ids, and those to more rows than were allocated."""
    for value in (float("nan"), -float("inf"), 0.0):
        _, expert_TK = top_k_gates(torch.full((3, 6), value), 4)
        assert expert_TK.tolist() == [[0, 1, 2, 3]] * 3


def test_logits_are_float32_and_differentiable():
    x_TD = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    w_ED = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    logits_TE = router_logits(x_TD, w_ED)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE, x_TD.float() @ w_ED.float().T)
    assert router_logits(x_TD.double(), w_ED.double()).dtype == torch.float64


def test_sinkhorn_balances_and_does_not_overflow():
    torch.manual_seed(0)
    logits_GTE = 300 * torch.randn(2, 64, 8)
    balanced = sinkhorn(logits_GTE, 8).exp()
    assert balanced.isfinite().all()
    torch.testing.assert_close(balanced.sum(1), torch.full((2, 8), 8.0))
    gentle = sinkhorn(torch.randn(2, 64, 8), 30).exp()
    torch.testing.assert_close(gentle.sum(2), torch.ones(2, 64), atol=1e-3, rtol=0)
    assert sinkhorn(torch.randn(0, 8).double(), 8).dtype == torch.float64
