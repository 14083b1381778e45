"""Router statistics against their definitions, token by token."""

from __future__ import annotations

import torch

from moe_dtensor.kernels.router import router_statistics

CASES = [(13, 5, 2), (70, 16, 3), (9, 512, 32), (3, 1, 1), (0, 4, 2), (200, 8, 1)]


def check_statistics(T: int, E: int, K: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    logits_TE = (3 * torch.randn(T, E)).to(device, dtype).requires_grad_()
    gate_TK = torch.rand(T, K).to(device, dtype).requires_grad_()
    if E > 2:
        with torch.no_grad():
            logits_TE[::3, 0] = -torch.inf
            logits_TE[1::3, 1] = logits_TE[1::3, 2] = 20  # a tie: no margin
    got = router_statistics(logits_TE, gate_TK)
    expected = torch.zeros(4, dtype=torch.float64)
    for logits_E, gate_K in zip(logits_TE.detach().cpu().double(), gate_TK.detach().cpu().double(), strict=True):
        probability_E = logits_E.softmax(0).sort(descending=True).values
        positive = probability_E[probability_E > 0]
        second = probability_E[1] if E > 1 else 0
        expected += torch.stack(
            [
                -(positive * positive.log()).sum(),
                probability_E[0] - second,
                gate_K.square().sum().sqrt(),
                logits_E.exp().sum().log() ** 2,
            ]
        )
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert not got.requires_grad
    torch.testing.assert_close(got.cpu(), expected.to(got.dtype))
    assert torch.equal(router_statistics(logits_TE, gate_TK), got)
