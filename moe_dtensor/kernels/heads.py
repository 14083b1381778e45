"""Norm and rotation of queries or keys in one pass over them, and in one pass back.

Where the norm spans more heads than are here (:func:`norm_parts_and_rotate`), squares are summed forward in one pass,
and with the sum over all heads norm and rotation take another. Backward, one pass gives the gradients of weight and
squares, and when that of the squares is summed another the gradient of x. Their kernels are in
:mod:`.heads_parts_triton`.

B sequences, S positions, H heads, C head width, W width of a norm (H * C or C), T tokens. Where tokens of several
shards of the positions come one after the other, they are R = B * shards sequences of Q = S / shards positions.
"""

from __future__ import annotations

from collections.abc import Callable

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
        return _forward(x_RQHC, weight_W, None, 0, eps, cos, sin, shards)

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


def _fake_partial(x: Tensor, weight_W: Tensor | None) -> Tensor:
    """What a backward pass gives of the weight's gradient, for tracing: ``(programs, W)``."""
    width = 0 if weight_W is None else weight_W.shape[0]
    return x.new_empty(triton_kernels("heads").programs(x), width, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0] * n, dy.shape[1] // n, *dy.shape[2:]), _fake_partial(dy, weight)


_forward = define(
    "norm_and_rotate(Tensor x, Tensor? weight, Tensor? squares, int width, float eps, Tensor cos, Tensor sin,"
    " int shards) -> Tensor",
    lambda *args: triton_kernels("heads").norm_and_rotate(*args),
    _fake_forward,
)
"""With ``squares``, of a norm over ``width``: see :func:`norm_parts_and_rotate`."""
_backward = define(
    "norm_and_rotate_backward(Tensor dy, Tensor? x, Tensor? weight, float eps, Tensor cos, Tensor sin, int shards)"
    " -> (Tensor, Tensor)",
    lambda *args: triton_kernels("heads").norm_and_rotate_backward(*args),
    _fake_backward,
)
"""Gradient of x, and of the weight ``(programs, W)``, to be summed over programs (W is 0 without a norm)."""


SumHeads = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def norm_parts_and_rotate(
    parts: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    widths: tuple[int, int],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    shards: int,
    sum_heads: SumHeads,
) -> tuple[Tensor, Tensor]:
    """:func:`norm_and_rotate` of queries and keys, each normed over all heads, here or not.

    Args:
        parts: the heads that are here, ``(R, Q, H, C)``.
        weights: of these heads, ``(W,)``: W is the width of the heads that are here.
        widths: of all heads.
        sum_heads: adds a number of each token for queries and for keys, ``(T,)``, to those of the other parts. Called
            without autograd, with squares and in the backward pass with their gradients: it is its own adjoint, as a
            sum that every part gets is.
    """
    return _NormPartsAndRotate.apply(*parts, *weights, widths, eps, cos, sin, shards, sum_heads)


class _NormPartsAndRotate(Function):
    @staticmethod
    def forward(ctx, q_RQHC, k_RQGC, q_weight_W, k_weight_W, widths, eps, cos, sin, shards, sum_heads):
        q_squares_T, k_squares_T = sum_heads(_squares(q_RQHC), _squares(k_RQGC))
        ctx.save_for_backward(q_RQHC, k_RQGC, q_weight_W, k_weight_W, q_squares_T, k_squares_T, cos, sin)
        ctx.widths, ctx.eps, ctx.shards, ctx.sum_heads = widths, eps, shards, sum_heads
        q_BSHC = _forward(q_RQHC, q_weight_W, q_squares_T, widths[0], eps, cos, sin, shards)
        k_BSGC = _forward(k_RQGC, k_weight_W, k_squares_T, widths[1], eps, cos, sin, shards)
        return q_BSHC, k_BSGC

    @staticmethod
    def backward(ctx, dq_BSHC, dk_BSGC):
        q_RQHC, k_RQGC, q_weight_W, k_weight_W, q_squares_T, k_squares_T, cos, sin = ctx.saved_tensors
        of_q = dq_BSHC, q_RQHC, q_weight_W, q_squares_T, ctx.widths[0], ctx.eps, cos, sin, ctx.shards
        of_k = dk_BSGC, k_RQGC, k_weight_W, k_squares_T, ctx.widths[1], ctx.eps, cos, sin, ctx.shards
        dq_squares_T, q_partial_NW = _backward_sums(*of_q)
        dk_squares_T, k_partial_NW = _backward_sums(*of_k)
        dq_squares_T, dk_squares_T = ctx.sum_heads(dq_squares_T, dk_squares_T)
        dq_weight_W = q_partial_NW.sum(0).to(q_weight_W.dtype)
        dk_weight_W = k_partial_NW.sum(0).to(k_weight_W.dtype)
        dq_RQHC, dk_RQGC = _backward_given(dq_squares_T, *of_q), _backward_given(dk_squares_T, *of_k)
        return dq_RQHC, dk_RQGC, dq_weight_W, dk_weight_W, None, None, None, None, None, None


def _fake_squares(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)


_squares = define(
    "squares_of_heads(Tensor x) -> Tensor",
    lambda x: triton_kernels("heads_parts").squares_of_heads(x),
    _fake_squares,
)
"""Each token's sum of squares ``(T,)``, float32."""
_backward_sums = define(
    "norm_and_rotate_backward_sums(Tensor dy, Tensor x, Tensor weight, Tensor squares, int width, float eps,"
    " Tensor cos, Tensor sin, int shards) -> (Tensor, Tensor)",
    lambda *args: triton_kernels("heads_parts").backward_sums(*args),
    lambda dy, x, weight, *_: (_fake_squares(x), _fake_partial(x, weight)),
)
"""Gradient of the squares' sum ``(T,)``, of which this is a part, and of the weight, as :data:`_backward`."""
_backward_given = define(
    "norm_and_rotate_backward_given(Tensor dsquares, Tensor dy, Tensor x, Tensor weight, Tensor squares, int width,"
    " float eps, Tensor cos, Tensor sin, int shards) -> Tensor",
    lambda *args: triton_kernels("heads_parts").backward_given(*args),
    lambda dsquares, dy, x, *_: x.new_empty(x.shape),
)
"""Gradient of x, with that of the squares from all parts."""
