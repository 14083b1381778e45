"""Router statistics through the Triton kernel."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.router import router_statistics
from tests.kernels.statistics_cases import CASES, check_statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "E", "K"), CASES)
def test_sums_over_tokens(T, E, K, dtype, device, poisoned_memory):
    check_statistics(T, E, K, dtype, device)


def test_large_logits_do_not_overflow(device):
    logits_TE = torch.tensor([[3000.0, 0.0], [-3000.0, 0.0]], device=device)
    got = router_statistics(logits_TE, torch.ones(2, 1, device=device))
    torch.testing.assert_close(got.cpu(), torch.tensor([0.0, 2.0, 2.0, 9e6]))
