"""Which sequence comes when: a keyed permutation of ``[0, n)``, and whose turn it is among several sources.

The permutation is a balanced Feistel network of six rounds over the smallest even number of bits that hold ``n``; a
value outside ``[0, n)`` is put through again until it falls inside ("cycle walking": Black and Rogaway, Ciphers with
Arbitrary Finite Domains, 2002).

Turns meet their sources' shares at every n. Job j of a source of share w may take place n from
``floor((j - 1) / w) + 1`` to ``ceil(j / w)``; each place takes the open job whose last place comes first. Then after
any n places every source has had less than one more or less than ``w n`` (Baruah, Cohen, Plaxton and Varvel,
Proportionate Progress, 1996).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

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


LARGEST_TOTAL = 1 << 30
SMALLEST_SHARE = 1e-5


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers: exactly as their decimals say, or to within 2^-30 of the whole where those are too long."""
    shares = [Fraction(str(w)) for w in weights]
    common = lcm(*(s.denominator for s in shares))
    whole = [int(s * common) for s in shares]
    total, divisor = sum(whole), gcd(*whole)
    if total // divisor <= LARGEST_TOTAL:
        return [w // divisor for w in whole]
    return [max(1, round(Fraction(w * LARGEST_TOTAL, total))) if w else 0 for w in whole]


class Turns:
    """The sequence of turns of sources with whole weights (0: never).

    Args:
        weights: from :func:`whole_weights`.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights, self.total = list(weights), sum(weights)
        self._active = [i for i, w in enumerate(weights) if w]
        self.seek(0)

    def take(self, count: int) -> list[tuple[int, int]]:
        """(source, which of its own, from 0) for the next ``count`` places."""
        taken = []
        for _ in range(count):
            self.place += 1
            chosen, last = -1, 0
            for i in self._active:
                if self._first[i] <= self.place and (chosen < 0 or self._last[i] < last):
                    chosen, last = i, self._last[i]
            taken.append((chosen, self.counts[chosen]))
            self.counts[chosen] += 1
            self._set(chosen)
        return taken

    def seek(self, place: int) -> None:
        """Go to where ``place`` places have been taken."""
        self.place, self.counts = place, self.counts_at(place)
        self._first, self._last = [0] * len(self.weights), [0] * len(self.weights)
        for i in self._active:
            self._set(i)

    def _set(self, i: int) -> None:
        """The places that the next job of source ``i`` may take."""
        done, weight = self.counts[i], self.weights[i]
        self._first[i] = done * self.total // weight + 1
        self._last[i] = -(-(done + 1) * self.total // weight)

    def counts_at(self, place: int) -> list[int]:
        """How many turns each source has had after ``place`` places, without going through them.

        Jobs whose last place has come are done. Each source has at most one that is open beyond: in the order of
        their last places, the first m of them together with all earlier jobs are a single queue, of which
        ``min over s of arrivals(s) + place - s`` are done.
        """
        rounds, n = divmod(place, self.total)
        done = [w * n // self.total for w in self.weights]
        straddling = sorted(
            (-(-(done[i] + 1) * self.total // w), i, done[i] * self.total // w + 1)
            for i, w in enumerate(self.weights)
            if w and w * n % self.total
        )
        if straddling:
            slack = self._slack(n, sorted({first for _, _, first in straddling}))
            before = n + min(0, *(g - sum(f <= start for _, _, f in straddling) for start, g in slack))
            for m, (_, i, _) in enumerate(straddling, 1):
                later = straddling[m:]
                now = n + min(0, *(g - sum(f <= start for _, _, f in later) for start, g in slack))
                done[i] += now - before
                before = now
        return [rounds * w + d for w, d in zip(self.weights, done, strict=True)]

    def _slack(self, n: int, starts: list[int]) -> list[tuple[int, int]]:
        """(start, least of ``arrivals(s) - s`` for s from it to the next start, or to n), for each start."""
        back_S = n - np.arange(starts[0], n + 1, dtype=np.int64)
        slack_S = back_S - n
        for w in self.weights:
            whole, part = divmod(w * n, self.total)
            slack_S += whole - (w * back_S - part) // self.total
        ends = [*starts[1:], n + 1]
        return [
            (start, int(slack_S[start - starts[0] : end - starts[0]].min()))
            for start, end in zip(starts, ends, strict=True)
        ]
