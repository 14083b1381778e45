"""Windows of seq_len + 1 tokens of an array, in a fixed shuffled order: as they come, or whole documents in each.

Windows start every seq_len tokens, so neighbours share one token: the last label of a window is the first token of
the next, and each token of the corpus but the first is a target once an epoch. N tokens, D documents, pieces or
conversations, S seq_len.

Best-fit packing of whole documents: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830. The
shuffled order of many windows is a keyed permutation of ``[0, n)``: a balanced Feistel network of six rounds over the
smallest even number of bits that hold ``n``; a value outside ``[0, n)`` is put through again until it falls inside
("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Data
from moe_dtensor.data.pack import FIRST, PADDING, TRAINED

SCAN_IDS = 1 << 20
ROUNDS = 6


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
        tokens_N: marked ids (:mod:`moe_dtensor.data.pack`).
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
