"""Windows of seq_len + 1 tokens, in a fixed shuffled order: from an array, or from a stream of documents.

Windows start every seq_len tokens, so neighbours share one token: the last label of a window is the first token of
the next, and each token of the corpus but the first is a target once an epoch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Windows(Protocol):
    """An endless sequence of windows with a position."""

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """Of the next ``count`` windows those in ``[first, last)``, (last - first, seq_len + 1); moves on by count."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""


class ArrayWindows:
    """Windows of a token array. Epoch e visits them in the order drawn from (seed, e)."""

    def __init__(self, tokens_N: np.ndarray, seq_len: int, seed: int) -> None:
        self.tokens_N, self.seq_len, self.seed = tokens_N, seq_len, seed
        self.num_windows = max(0, (len(tokens_N) - 1) // seq_len)
        self.position = 0
        self._order: tuple[int, np.ndarray] | None = None

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """See :class:`Windows`; only the asked windows are touched."""
        out = np.empty((last - first, self.seq_len + 1), self.tokens_N.dtype)
        for row, index in enumerate(range(self.position + first, self.position + last)):
            epoch, place = divmod(index, self.num_windows)
            start = int(self.order(epoch)[place]) * self.seq_len
            out[row] = self.tokens_N[start : start + self.seq_len + 1]
        self.position += count
        return out

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the latest is kept."""
        if self._order is None or self._order[0] != epoch:
            order = np.arange(self.num_windows, dtype=np.uint32 if self.num_windows < 2**32 else np.uint64)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def state(self) -> dict[str, Any]:
        """Windows read so far, over all epochs."""
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`Windows`."""
        self.position = state["position"]
