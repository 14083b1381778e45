"""How a layer reads its weights, and the layers that are one weight: a linear map, the token embedding, the norms.

B sequences, S positions, T tokens, V vocabulary, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dtensor.config.schema import Config

WeightView = Callable[[nn.Module, str], Tensor]
"""Module and parameter name to the tensor that the module computes with."""


class Layer(nn.Module):
    """A module that has weights of its own. It computes with ``self.local_weight(name)``, never with ``self.name``.

    On one device the two are the same. When weights are sharded, ``parallel/`` enters a view for each in
    ``weight_views``, and the layer computes with this rank's shard.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight_views: dict[str, WeightView] = {}

    def local_weight(self, name: str) -> Tensor:
        """The parameter called ``name``, or this rank's shard of it."""
        view = self.weight_views.get(name)
        return getattr(self, name) if view is None else view(self, name)


class Linear(Layer):
    """``x W^T``, or ``x W^T + b``; ``weight`` is ``(out, in)``. May hold a shard of either dimension, of ``out`` if it
    has a bias."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        bias = None if self.bias is None else self.local_weight("bias")
        return F.linear(x, self.local_weight("weight"), bias)


class Embedding(Layer):
    """Rows of the vocabulary table. May hold a run of all rows from ``first_row``: other tokens give zeros."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.first_row = 0

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """``(B, S)`` int64 in, ``(B, S, D)`` out."""
        weight_VD = self.local_weight("weight")
        if weight_VD.shape[0] == self.num_rows:
            return F.embedding(tokens_BS, weight_VD)
        row_BS = tokens_BS - self.first_row
        held_BS = (row_BS >= 0) & (row_BS < weight_VD.shape[0])
        return F.embedding(row_BS.where(held_BS, 0), weight_VD) * held_BS[..., None]


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
