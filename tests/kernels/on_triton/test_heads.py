"""Norm and rotation of heads against the layers that do one after the other, in float64."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.heads import norm_and_rotate, norm_parts_and_rotate, takes
from moe_dtensor.layers.positions import rotate


def plainly(x, weight, eps, cos, sin, shards=1):
    if weight is not None:
        rows = x.flatten(2) if weight.numel() > x.shape[-1] else x
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
        x = rows.view(x.shape)
    return rotate(in_sequences(x, shards), cos, sin)


def in_sequences(x, shards):
    return torch.cat(x.chunk(shards), dim=1)


@pytest.mark.parametrize("norm", ["none", "head", "full"])
@pytest.mark.parametrize(
    ("B", "S", "H", "C", "own_positions", "shards"),
    [
        (2, 5, 3, 8, False, 1),
        (3, 7, 4, 16, True, 1),
        (1, 1, 1, 6, True, 1),
        (3, 4, 2, 8, True, 2),
        (2, 9, 3, 6, False, 3),
    ],
)
def test_equals_norm_then_rotation(B, S, H, C, own_positions, shards, norm, device, poisoned_memory):
    torch.manual_seed(0)
    width = {"none": 0, "head": C, "full": H * C}[norm]
    shape = (B * shards, S // shards, H, C)
    wide_x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    wide_weight = torch.randn(width, dtype=torch.float64, device=device, requires_grad=True) if width else None
    angle = torch.randn(B if own_positions else 1, S, 1, C // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    dy = torch.randn(B, H, S, C, device=device).transpose(1, 2)  # as attention gives it, not dense
    leaves = [leaf for leaf in (wide_x, wide_weight) if leaf is not None]
    expected_y = plainly(wide_x, wide_weight, 1e-3, cos.double(), sin.double(), shards)
    expected = torch.autograd.grad(expected_y, leaves, dy.double())
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    assert takes(narrow[0], C, cos)
    y = norm_and_rotate(narrow[0], narrow[1] if width else None, 1e-3, cos, sin, shards)
    got = torch.autograd.grad(y, narrow, dy)
    for a, b in zip([y, *got], [expected_y, *expected], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


class Part:
    """Some heads of queries or keys, normed over these and others that are elsewhere, plainly."""

    def __init__(self, heads, others, shards, B, S, C, cos, sin, device):
        make = {"dtype": torch.float64, "device": device}
        self.x = torch.randn(B * shards, S // shards, heads, C, requires_grad=True, **make)
        self.weight = torch.randn(heads * C, requires_grad=True, **make)
        self.other = torch.randn(B * shards * (S // shards), others * C, **make)
        self.width = (heads + others) * C
        self.squares_elsewhere = self.other.square().sum(1)
        squares = self.x.flatten(2).square().sum(2) + self.squares_elsewhere.view(self.x.shape[:2])
        scale = torch.rsqrt(squares / self.width + 1e-3)[..., None, None]
        self.y = rotate(in_sequences(self.x * scale * self.weight.view(heads, C), shards), cos, sin)
        # What is made of the other heads depends on these through the scale alone.
        d_elsewhere = torch.randn(self.x.shape[:2], **make)
        self.elsewhere = (scale[..., 0, 0] * d_elsewhere).sum()
        self.dsquares_elsewhere = torch.autograd.grad(self.elsewhere, squares, retain_graph=True)[0].flatten()
        self.dy = torch.randn(B, heads, S, C, device=device).transpose(1, 2)

    def gradients(self):
        return torch.autograd.grad((self.y * self.dy).sum() + self.elsewhere, (self.x, self.weight))

    def narrow(self):
        return tuple(leaf.detach().float().requires_grad_() for leaf in (self.x, self.weight))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_part_of_what_a_norm_spans(shards, device, poisoned_memory):
    """Whoever has the other heads adds squares, and their gradient: queries and keys of unlike widths."""
    torch.manual_seed(0)
    B, S, C = 2, 6, 6
    angle = torch.randn(B, S, 1, C // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    q, k = (Part(*heads, shards, B, S, C, cos.double(), sin.double(), device) for heads in ((3, 5), (1, 2)))
    calls = ["squares_elsewhere", "dsquares_elsewhere"]

    def sum_heads(of_q, of_k):
        assert not torch.is_grad_enabled()
        name = calls.pop(0)
        return tuple((part + getattr(whole, name)).float() for part, whole in ((of_q, q), (of_k, k)))

    (q_x, q_weight), (k_x, k_weight) = q.narrow(), k.narrow()
    widths = q.width, k.width
    got = norm_parts_and_rotate((q_x, k_x), (q_weight, k_weight), widths, 1e-3, cos, sin, shards, sum_heads)
    gradients = torch.autograd.grad(got, (q_x, q_weight, k_x, k_weight), (q.dy, k.dy))
    assert not calls
    for a, b in zip([*got, *gradients], [q.y, k.y, *q.gradients(), *k.gradients()], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_heads_of_a_joined_projection(device):
    """Queries that lie beside keys in memory: positions are further apart than their heads are wide."""
    joined = torch.randn(2, 3, 24, device=device)
    x = joined[..., :16].unflatten(-1, (2, 8))
    angle = torch.randn(1, 3, 1, 4, device=device)
    weight = torch.randn(16, device=device)
    got = norm_and_rotate(x, weight, 1e-5, angle.cos(), angle.sin())
    torch.testing.assert_close(got, plainly(x, weight, 1e-5, angle.cos(), angle.sin()), atol=1e-5, rtol=1e-5)


def test_what_is_only_turned_is_not_kept(device):
    x = torch.randn(1, 3, 2, 8, device=device, requires_grad=True)
    angle = torch.randn(1, 3, 1, 4, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        norm_and_rotate(x, None, 0.0, angle.cos(), angle.sin())
    assert kept == [angle.shape, angle.shape]


def test_what_it_does_not_take(device):
    cos = torch.ones(1, 3, 1, 2, device=device)
    assert not takes(torch.zeros(1, 3, 2, 8, device=device), 8, cos)
    assert not takes(torch.zeros(1, 3, 2, 4, dtype=torch.float64, device=device), 4, cos)
