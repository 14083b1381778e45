from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.router import router_statistics

from .statistics_cases import CASES, check_statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "E", "K"), CASES)
def test_sums_over_tokens(T, E, K, dtype):
    check_statistics(T, E, K, dtype, "cpu")


def test_large_logits_do_not_overflow():
    got = router_statistics(torch.tensor([[3000.0, 0.0], [-3000.0, 0.0]]), torch.ones(2, 1))
    torch.testing.assert_close(got, torch.tensor([0.0, 2.0, 2.0, 9e6]))
