"""Rotary positions and the attention mask, which all blocks of a forward pass share.

B sequences, S positions, C head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Made once for a forward pass, used by every attention layer in it."""

    cos: Tensor
    """``(B or 1, S, 1, C/2)``, at least float32."""
    sin: Tensor
    """The same."""
    mask: Tensor | None
    """``(B, 1, S, S)``, True where a query may see a key; None: plain causal attention."""


def build_positions(
    length: int,
    positions_BS: Tensor | None,
    documents_BS: Tensor | None,
    *,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Positions:
    """Angles position x theta^(-2j/C) for j < C/2 (RoFormer, arXiv:2104.09864, eq. 15), and the mask of documents.

    Args:
        length: S.
        positions_BS: position of each token; None: 0, 1, … S-1 in every sequence.
        documents_BS: document of each token; None: a sequence is one document.
        dtype: of the stream; angles are computed in at least float32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    if positions_BS is None:
        positions_BS = torch.arange(length, device=device)[None]
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    angle = positions_BS.to(dtype)[..., None, None] * theta**-exponent
    mask = None
    if documents_BS is not None:
        same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
        mask = same & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return Positions(angle.cos(), angle.sin(), mask)


def rotate(x_BSHC: Tensor, positions: Positions) -> Tensor:
    """Turn each pair (j, j + C/2) of a head by its angle; computed in at least float32."""
    cos, sin, _ = positions
    a, b = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BSHC.dtype)
