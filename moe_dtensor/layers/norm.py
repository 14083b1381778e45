"""Normalisation. T tokens, D width, H heads."""

from __future__ import annotations

from collections.abc import Callable

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

    ``sum_parts`` adds a tensor over the holders of the other parts and is the identity when
    this module holds the whole width.

    Args:
        dim: the whole width, heads x head_dim.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.dim = dim
        self.eps = eps
        self.sum_parts: Callable[[Tensor], Tensor] = _identity

    def forward(self, x: Tensor) -> Tensor:
        """``(..., held width)`` in, the same shape and dtype out."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = self.sum_parts(wide.square().sum(-1, keepdim=True)) / self.dim
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


def _identity(x: Tensor) -> Tensor:
    return x
