"""How a layer reads its weights, and the layers that are one weight: a linear map and the token embedding.

B sequences, S positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
