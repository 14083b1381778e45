"""What routing may know of a token beside its vector, and noise that depends on nothing else.

B sequences, S positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Whole sequences, whatever part of them a rank holds the vectors of."""

    id_BS: Tensor
    """Vocabulary ids, int64."""
    number_BS: Tensor
    """Number of each token in the run, int64: the same on every mesh, another for each token and step."""


def build_tokens(id_BS: Tensor, sequence_B: Tensor | None) -> Tokens:
    """Number tokens by their sequence's number in the run; None: those of a first batch."""
    sequences, length = id_BS.shape
    if sequence_B is None:
        sequence_B = torch.arange(sequences, device=id_BS.device)
    return Tokens(id_BS, sequence_B[:, None] * length + torch.arange(length, device=id_BS.device))


def uniform_noise(key: Tensor, stream: int) -> Tensor:
    """A number from 0 to 1 (exclusive both) for each int64 key, float64; another one in each stream.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on key + stream times its increment: the same on every
    device, with no state that meshes would have to share.
    """
    # A tensor, for torch.compile, which makes a number that differs between layers a symbol.
    z = key + torch.full((), stream + 1, dtype=torch.int64, device=key.device) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    # 52 bits: with 53 the half would be rounded, now and then up to 1.
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Of the 64 bits, without their sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    bits &= (1 << 64) - 1
    return bits - (1 << 64) if bits >> 63 else bits
