"""Which keys a query sees, in the forms that the ways to compute attention want.

Documents lie one after the other and a window moves along, so what a query sees is always a run of keys that ends at
its own position: a number for each query says it all, and no (S, S) mask is made.

B sequences, S positions, R blocks of 128 positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class Visible(NamedTuple):
    """Of one kind of layer, in one forward pass."""

    first_BS: Tensor | None
    """Position of the first key that each query sees, int32, ``(B, S)``; the last is its own. None: 0."""
    blocks: BlockMask | None
    """The same for FlexAttention; None: not to be used."""


def first_visible(documents_BS: Tensor | None, window: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The first key that each query sees, int32 ``(B, S)``.

    Args:
        documents_BS: number of each token's document; None: a sequence is one.
        window: positions that a query sees, its own included; 0: all before it.
        shape: ``(B, S)``.
    """
    at_BS = torch.arange(shape[1], device=device).expand(shape)
    first_BS = torch.zeros_like(at_BS)
    if documents_BS is not None:
        starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        first_BS = at_BS.where(starts_BS, 0).cummax(dim=1).values
    if window:
        first_BS = first_BS.maximum(at_BS - (window - 1))
    return first_BS.to(torch.int32)


def build_blocks(first_BS: Tensor) -> BlockMask:
    """FlexAttention's mask, without asking the device anything and in sizes that depend on S alone.

    ``first_BS`` never falls along a sequence, so the keys that a block of queries sees are a run of blocks. Those that
    all of its queries see whole need no mask inside.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = first_BS.shape[1]
    block_R = torch.arange(-(-length // BLOCK), device=first_BS.device)
    first_BR = first_BS[:, ::BLOCK, None] // BLOCK
    last_BR = first_BS[:, (block_R * BLOCK + BLOCK - 1).clamp(max=length - 1), None]
    before = block_R < block_R[:, None]
    whole = before & (block_R * BLOCK >= last_BR)
    partial = (
        (before | torch.eye(len(block_R), dtype=torch.bool, device=block_R.device)) & (block_R >= first_BR) & ~whole
    )

    def sees(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_BS[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(chosen_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, ``(B, 1, R)``, and a list of all that begins with
    them, ``(B, 1, R, R)``."""
    chosen = chosen_BRR[:, None].to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
