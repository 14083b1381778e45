"""Whole documents in sequences: best-fit packing (Ding et al., Fewer Truncations Improve Language Modeling,
arXiv:2404.10830). N tokens, D pieces, S seq_len."""

from __future__ import annotations

from typing import Any

import numpy as np

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
