"""Normalisation. T tokens, D width, H heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dtensor.config.schema import Config


def build_norm(config: Config) -> nn.Module:
    """The block's norm over the model width: RMSNorm, or LayerNorm without bias."""
    dim, eps = config.model.dim, config.model.norm_eps
    if config.model.norm == "layernorm":
        return nn.LayerNorm(dim, eps=eps, bias=False)
    return nn.RMSNorm(dim, eps=eps)


class HeadsNorm(nn.Module):
    """RMSNorm over the whole width of all heads (OLMoE), of which this module may hold a part.

    In two halves, so that whoever holds a part can add up the squares of all parts in between.

    Args:
        dim: the whole width, heads x head_dim.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
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
        return (wide * torch.rsqrt(squares / self.dim + self.eps)).to(self.weight.dtype) * self.weight
