"""Norm and rotation of queries or keys in one pass over them, and in one pass back.

B sequences, S positions, H heads, C head width, W width of a norm: H * C or C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels


def takes(x: Tensor, head_dim: int, cos: Tensor) -> bool:
    """Whether :func:`norm_and_rotate` has a kernel for queries or keys like ``x``: on a GPU, not in float64, heads
    that are turned whole."""
    return launches_triton(x) and x.dtype != torch.float64 and 2 * cos.shape[-1] == head_dim


def norm_and_rotate(x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm (arXiv:1910.07467), then rotary positions (RoFormer, arXiv:2104.09864), computed in float32.

    Args:
        x_BSHC: see :func:`takes`.
        weight_W: of the norm, over each head if W is C, over all of a position's heads if W is H * C. None: no norm.
        eps: added to the mean square.
        cos: ``(B or 1, S, 1, C/2)``, float32: pairs (j, j + C/2) are turned.
        sin: the same.

    Returns:
        ``(B, S, H, C)`` in the dtype of ``x_BSHC``, contiguous. Differentiable in x and the weight.
    """
    return _NormAndRotate.apply(x_BSHC, weight_W, eps, cos, sin)


class _NormAndRotate(Function):
    @staticmethod
    def forward(ctx, x_BSHC, weight_W, eps, cos, sin):
        ctx.save_for_backward(x_BSHC, weight_W, cos, sin)
        ctx.eps = eps
        return _forward(x_BSHC, weight_W, eps, cos, sin)

    @staticmethod
    def backward(ctx, dy_BSHC):
        x_BSHC, weight_W, cos, sin = ctx.saved_tensors
        dx_BSHC, partial_NW = _backward(dy_BSHC, x_BSHC, weight_W, ctx.eps, cos, sin)
        dweight_W = None if weight_W is None else partial_NW.sum(0).to(weight_W.dtype)
        return dx_BSHC, dweight_W, None, None, None


def _run_forward(x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return triton_kernels("heads").norm_and_rotate(x_BSHC, weight_W, eps, cos, sin)


_forward = define(
    "norm_and_rotate(Tensor x, Tensor? weight, float eps, Tensor cos, Tensor sin) -> Tensor",
    _run_forward,
    lambda x_BSHC, weight_W, eps, cos, sin: x_BSHC.new_empty(x_BSHC.shape),
)


def _run_backward(
    dy_BSHC: Tensor, x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return triton_kernels("heads").norm_and_rotate_backward(dy_BSHC, x_BSHC, weight_W, eps, cos, sin)


def _fake_backward(
    dy_BSHC: Tensor, x_BSHC: Tensor, weight_W: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    width = 0 if weight_W is None else weight_W.shape[0]
    partial_NW = x_BSHC.new_empty(triton_kernels("heads").programs(x_BSHC), width, dtype=torch.float32)
    return x_BSHC.new_empty(x_BSHC.shape), partial_NW


_backward = define(
    "norm_and_rotate_backward(Tensor dy, Tensor x, Tensor? weight, float eps, Tensor cos, Tensor sin)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
"""Gradient of x, and of the weight ``(programs, W)``, to be summed over programs (W is 0 without a norm)."""
