"""Rows for several receivers (ranks, experts), and their sum.

T tokens, R receivers, N rows, C columns.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.experts.permute import combine_rows, gather_rows


def spread_rows(x_TC: Tensor, position_TR: Tensor, rows: int) -> Tensor:
    """``(N, C)``: token t's row at each of ``position_TR[t]`` that is not -1; others are not written."""
    return _Spread.apply(x_TC, position_TR, rows)


def sum_rows(y_NC: Tensor, position_TR: Tensor) -> Tensor:
    """``(T, C)``: the sum of each token's rows, in the order of the receivers; 0 for a token without any."""
    return _Sum.apply(y_NC, position_TR)


class _Spread(Function):
    @staticmethod
    def forward(ctx, x_TC, position_TR, rows):
        ctx.save_for_backward(position_TR)
        return gather_rows(x_TC, position_TR, rows)

    @staticmethod
    def backward(ctx, grad_NC):
        (position_TR,) = ctx.saved_tensors
        return combine_rows(grad_NC, position_TR, None), None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx, y_NC, position_TR):
        ctx.save_for_backward(position_TR)
        ctx.rows = y_NC.shape[0]
        return combine_rows(y_NC, position_TR, None)

    @staticmethod
    def backward(ctx, grad_TC):
        (position_TR,) = ctx.saved_tensors
        return gather_rows(grad_TC, position_TR, ctx.rows), None
