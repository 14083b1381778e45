"""Norm and rotation of queries and keys where the norm spans more heads than are here.

Forward, squares are summed in one pass, and with the sum over all heads norm and rotation take another. Backward, one
pass gives the gradients of weight and squares, and when that of the squares is summed another the gradient of x. As in
:mod:`.heads`; T tokens, W width of the heads that are here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.heads import fake_partial, rotate_normed
from moe_dtensor.kernels.library import define, triton_kernels

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
    """:func:`.heads.norm_and_rotate` of queries and keys, each normed over all heads, here or not.

    Args:
        parts: the heads that are here, ``(R, Q, H, C)``.
        weights: of these heads, ``(W,)``.
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
        q_BSHC = rotate_normed(q_RQHC, q_weight_W, q_squares_T, widths[0], eps, cos, sin, shards)
        k_BSGC = rotate_normed(k_RQGC, k_weight_W, k_squares_T, widths[1], eps, cos, sin, shards)
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
    lambda dy, x, weight, *_: (_fake_squares(x), fake_partial(x, weight)),
)
"""Gradient of the squares' sum ``(T,)``, of which this is a part, and of the weight, as :data:`.heads._backward`."""
_backward_given = define(
    "norm_and_rotate_backward_given(Tensor dsquares, Tensor dy, Tensor x, Tensor weight, Tensor squares, int width,"
    " float eps, Tensor cos, Tensor sin, int shards) -> Tensor",
    lambda *args: triton_kernels("heads_parts").backward_given(*args),
    lambda dsquares, dy, x, *_: x.new_empty(x.shape),
)
"""Gradient of x, with that of the squares from all parts."""
