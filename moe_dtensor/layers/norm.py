"""Normalisation. T tokens, D width, H heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dtensor.config.schema import Config
from moe_dtensor.layers.weights import Layer


def build_norm(config: Config) -> Layer:
    """The block's norm over the model width."""
    model = config.model
    if model.norm == "layernorm":
        return LayerNorm(model.dim, model.norm_eps, model.norm_bias)
    return RMSNorm(model.dim, model.norm_eps)


class RMSNorm(Layer):
    """RMSNorm over the last dimension (arXiv:1910.07467).

    Args:
        dim: the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` in and out."""
        return F.rms_norm(x, x.shape[-1:], self.local_weight("weight"), self.eps)


class LayerNorm(Layer):
    """LayerNorm over the last dimension (arXiv:1607.06450).

    Args:
        dim: the last dimension.
        eps: added to the variance.
        bias: whether it has one.
    """

    def __init__(self, dim: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` in and out."""
        bias = None if self.bias is None else self.local_weight("bias")
        return F.layer_norm(x, x.shape[-1:], self.local_weight("weight"), bias, self.eps)


class HeadsNorm(Layer):
    """RMSNorm over the whole width of all heads (OLMoE), of which this module may hold a part.

    In two halves, so that whoever holds a part can add up the squares of all parts in between.

    Args:
        dim: the whole width, heads x head_dim.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim = dim
        self.eps = eps

    @staticmethod
    def widen(x: Tensor) -> Tensor:
        """In at least float32, as both halves want it."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def squares(wide: Tensor) -> Tensor:
        """``(..., held width)`` to the sum of its squares ``(..., 1)``."""
        return wide.square().sum(-1, keepdim=True)

    def forward(self, wide: Tensor, squares: Tensor) -> Tensor:
        """``(..., held width)``, given the squares' sum over the whole width; in the dtype of the weight."""
        weight = self.local_weight("weight")
        return (wide * torch.rsqrt(squares / self.dim + self.eps)).to(weight.dtype) * weight
