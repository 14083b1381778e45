"""The token embedding. B sequences, S positions, V vocabulary, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Rows of the vocabulary table. May hold a run of all rows from ``first_row``: other tokens give zeros."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.first_row = 0

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """``(B, S)`` int64 in, ``(B, S, D)`` out."""
        weight_VD = self.weight
        if weight_VD.shape[0] == self.num_rows:
            return F.embedding(tokens_BS, weight_VD)
        row_BS = tokens_BS - self.first_row
        held_BS = (row_BS >= 0) & (row_BS < weight_VD.shape[0])
        return F.embedding(row_BS.where(held_BS, 0), weight_VD) * held_BS[..., None]
