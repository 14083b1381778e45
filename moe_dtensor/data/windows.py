"""Windows of seq_len + 1 tokens, in a fixed shuffled order: from an array, or from a stream of documents.

Windows start every seq_len tokens, so neighbours share one token: the last label of a window is the first token of
the next, and each token of the corpus but the first is a target once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moe_dtensor.data.order import Permutation


class Windows(Protocol):
    """An endless sequence of windows with a position."""

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """Of the next ``count`` windows those in ``[first, last)``, (last - first, seq_len + 1); moves on by count."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""


TABLE_WINDOWS = 1 << 21
"""Up to so many windows NumPy shuffles a table of them; more are ordered by a keyed permutation, without one."""


class ArrayWindows:
    """Windows of a token array. Epoch e visits them in an order of its own.

    Args:
        tokens_N: an array, or what is sliced like one.
        seq_len: tokens in a sequence; a window has one more.
        seed: of the order.
        key: more that decides the order, by a keyed permutation. None: the order is drawn from (seed, e), by a keyed
            permutation only where a table would be large.
    """

    def __init__(self, tokens_N: Any, seq_len: int, seed: int, key: tuple[object, ...] | None = None) -> None:
        self.tokens_N, self.seq_len, self.seed, self.key = tokens_N, seq_len, seed, key
        self.num_windows = max(0, (len(tokens_N) - 1) // seq_len)
        self.position = 0
        self._table: tuple[int, np.ndarray] | None = None
        self.choose_order()

    def choose_order(self) -> None:
        """By a table or by a keyed permutation, as the number of windows says."""
        self.keyed = self.key is not None or self.num_windows > TABLE_WINDOWS

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """See :class:`Windows`; only the asked windows are touched."""
        out = self.rows(range(self.position + first, self.position + last))
        self.position += count
        return out

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """The windows with these numbers in the order of all epochs, (len(numbers), seq_len + 1)."""
        out = np.empty((len(numbers), self.seq_len + 1), self.tokens_N.dtype)
        for row, index in enumerate(self._places(numbers)):
            self._fill(out[row], index)
        return out

    def _fill(self, out_S1: np.ndarray, index: int) -> None:
        """Put window ``index`` of the array into ``out_S1``."""
        start = index * self.seq_len
        out_S1[:] = self.tokens_N[start : start + self.seq_len + 1]

    def _places(self, numbers: Sequence[int]) -> list[int]:
        """Which window of the array each number is."""
        places = [0] * len(numbers)
        by_epoch: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            by_epoch.setdefault(number // self.num_windows, []).append(row)
        for epoch, rows in by_epoch.items():
            inside = np.array([numbers[row] % self.num_windows for row in rows])
            if self.keyed:
                order = Permutation(self.num_windows, self.seed, self.key, epoch)(inside)
            else:
                order = self._order(epoch)[inside]
            for row, place in zip(rows, order.tolist(), strict=True):
                places[row] = place
        return places

    def _order(self, epoch: int) -> np.ndarray:
        """The shuffled table of an epoch; the latest is kept."""
        if self._table is None or self._table[0] != epoch:
            order = np.arange(self.num_windows, dtype=np.uint32 if self.num_windows < 2**32 else np.uint64)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._table = (epoch, order)
        return self._table[1]

    def state(self) -> dict[str, Any]:
        """Windows read so far, over all epochs."""
        return {"position": self.position} | ({"order": "keyed"} if self.keyed else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`Windows`. A state of an older version has no order: it was a table, and stays one."""
        self.keyed = self.key is not None or "order" in state
        self.position = state["position"]
