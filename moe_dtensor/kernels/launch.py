"""What all Triton launches of this room need on the host: rounding, and descriptors for bulk loads and stores (TMA)."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def describe(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A contiguous tensor, in blocks. Its address and all strides but the last are multiples of 16 bytes."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block_shape)


def describe_ragged(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """Contiguous rows, in blocks that are clipped at an expert's last row.

    Follows ``triton.tools.ragged_tma.create_ragged_descriptor``, without a bound on the columns of a block.
    """
    columns, far = x.shape[1], 1 << 30
    shape, strides = [0x7FFF0000, 0x7FFF0000, far, columns], [(1 << 34) - columns, columns, columns, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, *block_shape])


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up (Triton's own takes ten microseconds)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The lowest power of two that is at least ``n`` (n >= 1)."""
    return 1 << (n - 1).bit_length()
