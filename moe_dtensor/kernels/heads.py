"""Norm and rotation of queries or keys in one pass over them, and in one pass back.

B sequences, S positions, H heads, C head width, W width of a norm: H * C or C. Where tokens of several shards of the
positions come one after the other, they are R = B * shards sequences of Q = S / shards positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels


def takes(x: Tensor, head_dim: int, cos: Tensor) -> bool:
    """Whether there is a kernel for queries or keys like ``x``: on a GPU, not in float64, heads that are turned
    whole."""
    return launches_triton(x) and x.dtype != torch.float64 and 2 * cos.shape[-1] == head_dim


def norm_and_rotate(
    x_RQHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor, shards: int = 1
) -> Tensor:
    """RMSNorm (arXiv:1910.07467), then rotary positions (RoFormer, arXiv:2104.09864), computed in float32.

    Args:
        x_RQHC: see :func:`takes`.
        weight_W: of the norm, over each head if W is C, over all of a position's heads if W is H * C. None: no norm.
        eps: added to the mean square.
        cos: ``(B or 1, S, 1, C/2)``, float32: pairs (j, j + C/2) are turned.
        sin: the same.
        shards: of the positions; tokens come in their order, and are brought into whole sequences.

    Returns:
        ``(B, S, H, C)`` in the dtype of x, contiguous. Differentiable in x and the weight.
    """
    return _NormAndRotate.apply(x_RQHC, weight_W, eps, cos, sin, shards)


class _NormAndRotate(Function):
    @staticmethod
    def forward(ctx, x_RQHC, weight_W, eps, cos, sin, shards):
        # What is only turned is turned back without it.
        ctx.save_for_backward(None if weight_W is None else x_RQHC, weight_W, cos, sin)
        ctx.eps, ctx.shards = eps, shards
        return rotate_normed(x_RQHC, weight_W, None, 0, eps, cos, sin, shards)

    @staticmethod
    def backward(ctx, dy_BSHC):
        x_RQHC, weight_W, cos, sin = ctx.saved_tensors
        dx_RQHC, partial_NW = _backward(dy_BSHC, x_RQHC, weight_W, ctx.eps, cos, sin, ctx.shards)
        dweight_W = None if weight_W is None else partial_NW.sum(0).to(weight_W.dtype)
        return dx_RQHC, dweight_W, None, None, None, None


def _fake_forward(
    x: Tensor, weight: Tensor | None, squares: Tensor | None, width: int, eps: float, cos: Tensor, sin: Tensor, n: int
) -> Tensor:
    return x.new_empty(x.shape[0] // n, x.shape[1] * n, *x.shape[2:])


def fake_partial(x: Tensor, weight_W: Tensor | None) -> Tensor:
    """What a backward pass gives of the weight's gradient, for tracing: ``(programs, W)``."""
    width = 0 if weight_W is None else weight_W.shape[0]
    return x.new_empty(triton_kernels("heads").programs(x), width, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0] * n, dy.shape[1] // n, *dy.shape[2:]), fake_partial(dy, weight)


rotate_normed = define(
    "norm_and_rotate(Tensor x, Tensor? weight, Tensor? squares, int width, float eps, Tensor cos, Tensor sin,"
    " int shards) -> Tensor",
    lambda *args: triton_kernels("heads").norm_and_rotate(*args),
    _fake_forward,
)
"""With ``squares``, of a norm over ``width``: see :mod:`.heads_parts`."""
_backward = define(
    "norm_and_rotate_backward(Tensor dy, Tensor? x, Tensor? weight, float eps, Tensor cos, Tensor sin, int shards)"
    " -> (Tensor, Tensor)",
    lambda *args: triton_kernels("heads").norm_and_rotate_backward(*args),
    _fake_backward,
)
"""Gradient of x, and of the weight ``(programs, W)``, to be summed over programs (W is 0 without a norm)."""
