"""Whole documents and whole conversations in sequences. N tokens, D documents, pieces or conversations, S seq_len.

Best-fit packing: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Data
from moe_dtensor.data.marks import FIRST, PADDING, TRAINED
from moe_dtensor.data.windows import ArrayWindows

SCAN_IDS = 1 << 20


class FittedWindows(ArrayWindows):
    """Sequences of whole documents. A longer document is cut into windows that share one token, as all windows are; its
    rest is packed like a document. What a sequence leaves open is filled with end tokens, which are no targets.

    Args:
        tokens_N: each document followed by its end token.
        seq_len: tokens in a sequence; a window has one more.
        seed: of the order.
        end_id: the end token.
        key: see :class:`ArrayWindows`.
    """

    def __init__(
        self, tokens_N: Any, seq_len: int, seed: int, end_id: int, key: tuple[object, ...] | None = None
    ) -> None:
        super().__init__(tokens_N, seq_len, seed, key)
        self.filler = self.end_id = end_id
        start_D, length_D = self.find()
        bin_D = best_fit(length_D, seq_len + 1)
        order_D = np.argsort(bin_D, kind="stable")
        self._start_D, self._length_D = start_D[order_D], length_D[order_D]
        self.num_windows = int(bin_D.max(initial=-1)) + 1
        self._first_W = np.searchsorted(bin_D[order_D], np.arange(self.num_windows + 1))
        self.padding = self.num_windows * (seq_len + 1) - int(length_D.sum())
        """Tokens of all windows that no document fills."""
        self.choose_order()

    def find(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and length ``(D)`` of the pieces to pack."""
        start_D, length_D, self.documents, self.cut = find_pieces(self.tokens_N, self.seq_len + 1, self.end_id)
        return start_D, length_D

    def _fill(self, out_S1: np.ndarray, index: int) -> None:
        place = 0
        for piece in range(self._first_W[index], self._first_W[index + 1]):
            start, length = int(self._start_D[piece]), int(self._length_D[piece])
            out_S1[place : place + length] = self.tokens_N[start : start + length]
            place += length
        out_S1[place:] = self.filler

    def told(self) -> str:
        """Shares of padding and of cut documents, for the start of a run."""
        whole = max(1, self.num_windows * (self.seq_len + 1))
        return (
            f"packing best_fit: {self.num_windows:,} sequences, {self.padding / whole:.2%} padding, "
            f"{self.cut / max(1, self.documents):.2%} of the documents cut"
        )


def find_pieces(tokens_N: Any, size: int, end_id: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Start and length ``(D)`` of the pieces of all documents, none longer than ``size``; how many documents there are,
    and how many were cut."""
    ends = [
        np.flatnonzero(np.asarray(tokens_N[place : place + SCAN_IDS]) == end_id) + place + 1
        for place in range(0, len(tokens_N), SCAN_IDS)
    ]
    end_D = np.concatenate([*ends, np.empty(0, np.int64)]).astype(np.int64)
    if len(tokens_N) and (not len(end_D) or end_D[-1] != len(tokens_N)):
        end_D = np.append(end_D, len(tokens_N))
    start_D = np.concatenate([[0], end_D[:-1]]).astype(np.int64) if len(end_D) else end_D
    length_D = end_D - start_D
    # Windows that share a token: each takes size - 1 more.
    pieces_D = np.maximum(1, -(-(length_D - 1) // (size - 1)))
    number = np.arange(int(pieces_D.sum())) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    starts = np.repeat(start_D, pieces_D) + number * (size - 1)
    lengths = np.minimum(np.repeat(end_D, pieces_D) - starts, size)
    return starts, lengths, len(length_D), int((pieces_D > 1).sum())


def best_fit(length_D: np.ndarray, size: int) -> np.ndarray:
    """The bin of each piece ``(D)``: longest first, each into the fullest bin that still has room for it."""
    bin_D = np.zeros(len(length_D), np.int64)
    rooms: list[list[int]] = [[] for _ in range(size + 1)]
    open_rooms = 0  # bit r is set where some bin has room for r
    bins = 0
    for piece in np.argsort(-length_D, kind="stable").tolist():
        length = int(length_D[piece])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            found = rooms[room].pop()
            if not rooms[room]:
                open_rooms &= ~(1 << room)
        else:
            found, room, bins = bins, size, bins + 1
        bin_D[piece] = found
        left = room - length
        if left:
            rooms[left].append(found)
            open_rooms |= 1 << left
    return bin_D


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
