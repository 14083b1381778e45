"""Norm and rotation of heads against the layers that do one after the other, in float64."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.heads import norm_and_rotate, takes
from moe_dtensor.layers.positions import rotate


def plainly(x, weight, eps, cos, sin):
    if weight is not None:
        rows = x.flatten(2) if weight.numel() > x.shape[-1] else x
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
        x = rows.view(x.shape)
    return rotate(x, cos, sin)


@pytest.mark.parametrize("norm", ["none", "head", "full"])
@pytest.mark.parametrize(
    ("B", "S", "H", "C", "own_positions"), [(2, 5, 3, 8, False), (3, 7, 4, 16, True), (1, 1, 1, 6, True)]
)
def test_equals_norm_then_rotation(B, S, H, C, own_positions, norm, device, poisoned_memory):
    torch.manual_seed(0)
    width = {"none": 0, "head": C, "full": H * C}[norm]
    wide_x = torch.randn(B, S, H, C, dtype=torch.float64, device=device, requires_grad=True)
    wide_weight = torch.randn(width, dtype=torch.float64, device=device, requires_grad=True) if width else None
    angle = torch.randn(B if own_positions else 1, S, 1, C // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    dy = torch.randn(B, H, S, C, device=device).transpose(1, 2)  # as attention gives it, not dense
    leaves = [leaf for leaf in (wide_x, wide_weight) if leaf is not None]
    expected_y = plainly(wide_x, wide_weight, 1e-3, cos.double(), sin.double())
    expected = torch.autograd.grad(expected_y, leaves, dy.double())
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    assert takes(narrow[0], C, cos)
    y = norm_and_rotate(narrow[0], narrow[1] if width else None, 1e-3, cos, sin)
    got = torch.autograd.grad(y, narrow, dy)
    for a, b in zip([y, *got], [expected_y, *expected], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_heads_of_a_joined_projection(device):
    """Queries that lie beside keys in memory: positions are further apart than their heads are wide."""
    joined = torch.randn(2, 3, 24, device=device)
    x = joined[..., :16].unflatten(-1, (2, 8))
    angle = torch.randn(1, 3, 1, 4, device=device)
    weight = torch.randn(16, device=device)
    got = norm_and_rotate(x, weight, 1e-5, angle.cos(), angle.sin())
    torch.testing.assert_close(got, plainly(x, weight, 1e-5, angle.cos(), angle.sin()), atol=1e-5, rtol=1e-5)


def test_what_it_does_not_take(device):
    cos = torch.ones(1, 3, 1, 2, device=device)
    assert not takes(torch.zeros(1, 3, 2, 8, device=device), 8, cos)
    assert not takes(torch.zeros(1, 3, 2, 4, dtype=torch.float64, device=device), 4, cos)
