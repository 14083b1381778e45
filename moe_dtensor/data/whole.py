"""Whole conversations in sequences. N tokens, D conversations, S seq_len."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Data
from moe_dtensor.data.fit import SCAN_IDS, FittedWindows
from moe_dtensor.data.marks import FIRST, PADDING, TRAINED
from moe_dtensor.data.windows import ArrayWindows


class ConversationWindows(FittedWindows):
    """Sequences of whole conversations, packed as :class:`FittedWindows` packs documents.

    Args:
        tokens_N: marked ids (:mod:`moe_dtensor.data.marks`).
        seq_len: tokens in a sequence; a window has one more.
        seed: of the order.
        end_id: fills what a sequence leaves open.
        key: see :class:`ArrayWindows`.
        too_long: ``data.too_long``.

    Raises:
        ConfigError: a conversation is too long, and ``too_long`` refuses it.
    """

    def __init__(
        self,
        tokens_N: Any,
        seq_len: int,
        seed: int,
        end_id: int,
        key: tuple[object, ...] | None = None,
        too_long: Literal["refuse", "cut", "drop"] = "refuse",
    ) -> None:
        self.too_long = too_long
        super().__init__(tokens_N, seq_len, seed, end_id, key)
        self.filler = end_id | PADDING | FIRST

    def find(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and length ``(D)`` of what is kept of the conversations that have something to train on."""
        limit = self.seq_len + 1
        start_D, trained_D = scan(self.tokens_N)
        length_D = np.diff(start_D, append=len(self.tokens_N))
        long_D = length_D > limit
        if self.too_long == "refuse" and long_D.any():
            raise ConfigError(
                f"{long_D.sum():,} of {len(length_D):,} conversations have more than training.seq_len + 1 = {limit:,} "
                f"tokens; the longest has {length_D.max():,}.",
                f'Set training.seq_len = {length_D.max() - 1}, or data.too_long = "cut" or "drop".',
            )
        for i in np.flatnonzero(long_D):
            kept_S1 = self.tokens_N[start_D[i] : start_D[i] + limit]
            trained_D[i] = 0 if self.too_long == "drop" else np.count_nonzero(kept_S1[1:] & TRAINED)
        kept_D = trained_D > 0
        self.documents, self.cut = int(kept_D.sum()), int((kept_D & long_D).sum())
        self.dropped = len(kept_D) - self.documents
        """Conversations that are left out: too long, or without anything to train on in what is kept of them."""
        self.trained = int(trained_D.sum())
        """Tokens of all windows that are targets."""
        return start_D[kept_D], np.minimum(length_D, limit)[kept_D]

    def told(self) -> str:
        """Shares of padding and of trained tokens, and what became of long conversations."""
        whole = max(1, self.num_windows * (self.seq_len + 1))
        return (
            f"packing conversations: {self.documents:,} in {self.num_windows:,} sequences, "
            f"{self.padding / whole:.2%} padding, {self.trained / whole:.2%} of the tokens trained, {self.cut:,} cut, "
            f"{self.dropped:,} left out"
        )


def scan(tokens_N: Any) -> tuple[np.ndarray, np.ndarray]:
    """Start ``(D)`` of each conversation, and how many of its tokens after the first are trained."""
    starts, trained = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for place in range(0, len(tokens_N), SCAN_IDS):
        ids_N = np.asarray(tokens_N[place : place + SCAN_IDS])
        starts.append(np.flatnonzero(ids_N & FIRST) + place)
        trained.append(np.flatnonzero((ids_N & (TRAINED | FIRST)) == TRAINED) + place)
    start_D, trained_T = np.concatenate(starts), np.concatenate(trained)
    bound_D = np.searchsorted(trained_T, np.append(start_D, len(tokens_N)))
    return start_D, np.diff(bound_D)


def cut_windows(
    tokens_N: Any, seq_len: int, seed: int, data: Data, corpus: Any, key: tuple[object, ...] | None = None
) -> ArrayWindows:
    """The windows of an array of tokens, as ``data`` packs them.

    Args:
        tokens_N: of ``corpus``.
        seq_len: tokens in a sequence.
        seed: of the order.
        data: of the run.
        corpus: tells whether they are conversations.
        key: see :class:`ArrayWindows`.
    """
    end_id = corpus.tokenizer.end_id
    if getattr(corpus, "marked", False):
        return ConversationWindows(tokens_N, seq_len, seed, end_id, key, data.too_long)
    if data.packing == "best_fit":
        return FittedWindows(tokens_N, seq_len, seed, end_id, key)
    return ArrayWindows(tokens_N, seq_len, seed, key)
