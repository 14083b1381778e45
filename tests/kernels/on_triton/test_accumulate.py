"""Adding narrow gradients up, against torch."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels import accumulate
from moe_dtensor.kernels.accumulate import add_narrow, widened


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (5, 4099), (2, 3, 4096)])
def test_sums_are_those_of_float32(shape, dtype, device, poisoned_memory, monkeypatch):
    monkeypatch.setattr(accumulate, "WORTH", 1)
    torch.manual_seed(0)
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    total = widened(grads[0], torch.float32)
    assert torch.equal(total, grads[0].float())
    for grad in grads[1:]:
        add_narrow(total, grad)
    assert torch.equal(total, grads[0].float() + grads[1].float() + grads[2].float())


def test_what_has_no_kernel(device):
    grad = torch.randn(6, 4, device=device).bfloat16().t()
    total = widened(grad, torch.float32)
    add_narrow(total, grad)
    assert torch.equal(total, 2 * grad.float())
    wide = torch.ones(3, device=device, dtype=torch.float64)
    add_narrow(wide, wide.clone())
    assert torch.equal(wide, torch.full_like(wide, 2))
