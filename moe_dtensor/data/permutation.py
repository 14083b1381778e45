"""A keyed permutation of ``[0, n)``: any entry in constant time, no table.

A balanced Feistel network of six rounds over the smallest even number of bits that hold ``n``; a value outside
``[0, n)`` is put through again until it falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary
Finite Domains, 2002).
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A permutation of ``[0, size)``.

    Args:
        size: at least 1, below 2^62.
        key: values whose text decides the order.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, index_N: np.ndarray) -> np.ndarray:
        """Where the entries ``index_N``, each in ``[0, size)``, go: int64 ``(N)``."""
        out_N = self._once(np.asarray(index_N, np.uint64))
        outside = np.flatnonzero(out_N >= self.size)
        while len(outside):
            out_N[outside] = self._once(out_N[outside])
            outside = outside[out_N[outside] >= self.size]
        return out_N.astype(np.int64)

    def _once(self, x_N: np.ndarray) -> np.ndarray:
        left_N, right_N = x_N >> self._half, x_N & self._mask
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (mix(right_N ^ key) & self._mask)
        return (left_N << self._half) | right_N


def mix(x_N: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input reaches every bit."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))
