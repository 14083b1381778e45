"""Router sizes for tests, and the comparison of gates and their gradient with plain PyTorch."""

from __future__ import annotations

import torch

from moe_dtensor.kernels.router import top_k_gates

CASES = [
    (13, 5, 2, "softmax", False),
    (13, 5, 2, "softmax", True),
    (70, 16, 16, "softmax", True),
    (70, 16, 16, "softmax", False),
    (9, 512, 32, "softmax", False),
    (9, 512, 32, "softmax", True),
    (9, 8, 1, "sigmoid", False),
    (9, 8, 1, "sigmoid", True),
    (21, 6, 3, "sigmoid", True),
    (1, 1, 1, "softmax", False),
]


def check_gates(T: int, E: int, K: int, score: str, normalize: bool, ranked: bool, device: str) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(T, E, device=device, requires_grad=True)
    ranking_TE = torch.randn(T, E, device=device) if ranked else None
    gate_TK, expert_TK = top_k_gates(logits_TE, K, score=score, ranking_TE=ranking_TE, normalize=normalize)
    expected_TK = (ranking_TE if ranked else logits_TE.detach()).topk(K, 1).indices
    wide_TE = logits_TE.detach().double().requires_grad_()
    scores_TE = wide_TE.softmax(1) if score == "softmax" else wide_TE.sigmoid()
    score_TK = scores_TE.gather(1, expected_TK)
    if normalize:
        score_TK = score_TK / score_TK.sum(1, keepdim=True)
    assert torch.equal(expert_TK, expected_TK)
    torch.testing.assert_close(gate_TK, score_TK.float())
    dgate_TK = torch.randn(T, K, device=device)
    (got,) = torch.autograd.grad(gate_TK, logits_TE, dgate_TK)
    (expected,) = torch.autograd.grad(score_TK, wide_TE, dgate_TK.double())
    torch.testing.assert_close(got, expected.float())


def check_tiny_scores(score: str, device: str) -> None:
    """The chosen scores are exp(-600) and exp(-601): their sum is 0 in float32, their ratio is not."""
    ranking_TE = torch.tensor([[2.0, 1.0, 0.0]], device=device)
    logits_TE = torch.tensor([[-600.0, -601.0, 5.0]], device=device, requires_grad=True)
    gate_TK, _ = top_k_gates(logits_TE, 2, score=score, ranking_TE=ranking_TE, normalize=True)
    expected_TK = torch.tensor([[0.0, -1.0]], device=device).softmax(1)
    torch.testing.assert_close(gate_TK, expected_TK)
    gate_TK[0, 0].backward()
    slope = expected_TK.prod().item()
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[slope, -slope, 0.0]], device=device))
