"""Activations and their written gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_dtensor.kernels.experts.activation import ACTIVATIONS, activate, activation_gradient, num_up_projections
from moe_dtensor.kernels.experts.mlp import expert_mlp


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_is_that_of_autograd(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (50, num_up_projections(activation), 8)
    h = (6 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    da = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    a = activate(h, activation)
    (expected,) = torch.autograd.grad(a, h, da)
    found_a, found = activation_gradient(h.detach(), da, activation)
    assert torch.equal(found_a, a.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_clamps_pass_the_gradient_at_their_bounds_as_torch_does() -> None:
    values = torch.tensor([-8.0, -7.0, 0.0, 7.0, 8.0], dtype=torch.float64)
    h = torch.cartesian_prod(values, values)[:, :, None].requires_grad_()
    a = activate(h, "swiglu_clamped")
    (expected,) = torch.autograd.grad(a.sum(), h)
    torch.testing.assert_close(activation_gradient(h.detach(), torch.ones_like(a), "swiglu_clamped")[1], expected)


def test_operators_run_under_a_dispatch_mode() -> None:
    """torch's FlopCounterMode runs operators where autograd is off."""
    x, gate = torch.randn(6, 8, requires_grad=True), torch.rand(6, 1)
    w_up, w_down = torch.randn(2, 2, 16, 8, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    ids = torch.tensor([[0], [1], [0], [1], [1], [0]])

    def run() -> None:
        expert_mlp(x, w_up, w_down, gate, ids, activation="swiglu", backend="torch").sum().backward()

    run()
    expected, x.grad = x.grad, None
    with FlopCounterMode(display=False):
        run()
    assert torch.equal(x.grad, expected)
