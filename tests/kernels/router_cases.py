"""Router sizes for tests, and the comparison of gates and their gradient with plain PyTorch."""

from __future__ import annotations

import torch

from moe_dtensor.kernels.router import top_k_gates

CASES = [
    (13, 5, 2, "softmax"),
    (70, 16, 16, "softmax"),
    (9, 512, 32, "softmax"),
    (9, 8, 1, "sigmoid"),
    (1, 1, 1, "softmax"),
]


def check_gates(T: int, E: int, K: int, score: str, ranked: bool, device: str) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(T, E, device=device, requires_grad=True)
    ranking_TE = torch.randn(T, E, device=device) if ranked else None
    gate_TK, expert_TK = top_k_gates(logits_TE, K, score=score, ranking_TE=ranking_TE)
    expected_TK = (ranking_TE if ranked else logits_TE.detach()).topk(K, 1).indices
    scores_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    assert torch.equal(expert_TK, expected_TK)
    torch.testing.assert_close(gate_TK, scores_TE.gather(1, expected_TK))
    dgate_TK = torch.randn(T, K, device=device)
    (got,) = torch.autograd.grad(gate_TK, logits_TE, dgate_TK)
    (expected,) = torch.autograd.grad(scores_TE.gather(1, expected_TK), logits_TE, dgate_TK)
    torch.testing.assert_close(got, expected)
