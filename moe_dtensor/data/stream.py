"""Windows of documents that are read and tokenised as training goes, with a position to resume from."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.host import host_chunks
from moe_dtensor.data.pack import Document, join_documents, take_chunk, token_dtype

BLOCK_WINDOWS = 256  # a stream is shuffled within blocks of this many windows


@dataclass(frozen=True)
class Chunk:
    """The tokens of some documents, and where the stream stood before them."""

    epoch: int
    documents: Any
    """State of the documents' iterator before the chunk."""
    seen: int
    """Tokens of the epoch before the chunk."""
    tokens_N: np.ndarray


class TokenStream:
    """The tokens of a split over and over.

    Args:
        corpus: its ``documents(split)`` is called once an epoch.
        split: ``train`` or ``validation``.
        least: tokens that an epoch must have; fewer are a ConfigError at its end.
        epochs: times that it may be read; 0: any.
        name: of the source, for errors.
    """

    def __init__(self, corpus: Any, split: str, least: int, epochs: float = 0.0, name: str = "") -> None:
        self.corpus, self.split, self.least, self.epochs, self.name = corpus, split, least, epochs, name
        self.dtype = token_dtype(corpus.tokenizer.vocab_size)
        self._chunks_of_host = host_chunks(f"{corpus.fingerprint()} {split}")
        self.seek({"epoch": 0, "documents": None, "seen": 0, "offset": 0})

    def read(self, count: int) -> np.ndarray:
        """The next ``count`` tokens; the last of them is read again by the next call."""
        while sum(len(c.tokens_N) for c in self._chunks) - self._offset < count:
            self._chunks.append(self._fetch())
        parts = [c.tokens_N for c in self._chunks]
        out = (parts[0] if len(parts) == 1 else np.concatenate(parts))[self._offset : self._offset + count]
        self._offset += count - 1
        while self._offset >= len(self._chunks[0].tokens_N):
            self._offset -= len(self._chunks.popleft().tokens_N)
        return out

    def position(self) -> dict[str, Any]:
        """Where the next token is: the chunk it is in and its place there, as JSON values."""
        if not self._chunks:
            return {"epoch": self._epoch, "documents": self._state(), "seen": self._seen, "offset": self._offset}
        chunk = self._chunks[0]
        return {"epoch": chunk.epoch, "documents": chunk.documents, "seen": chunk.seen, "offset": self._offset}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to what :meth:`position` gave."""
        self._chunks: deque[Chunk] = deque()
        self._epoch, self._seen, self._offset = position["epoch"], position["seen"], position["offset"]
        self._open(position["documents"])

    def _open(self, state: Any) -> None:
        """Start an epoch, or continue in it: by the iterator's own state, else by reading past what was read."""
        self._documents: Iterator[Document] = iter(self.corpus.documents(self.split))
        self._count = 0
        if state is None:
            return
        if hasattr(self._documents, "load_state_dict"):
            self._documents.load_state_dict(state)
        else:
            self._count = state
            next(islice(self._documents, state, state), None)

    def _state(self) -> Any:
        """The iterator's position; None at its start."""
        return self._documents.state_dict() if hasattr(self._documents, "state_dict") else (self._count or None)

    def close(self) -> None:
        """Give back what the host's ranks share."""
        self._chunks_of_host.close()

    def _encode(self, documents: list[Document], state: Any) -> np.ndarray:
        """The tokens of a chunk; text is tokenised by one of the host's ranks for all."""

        def make() -> np.ndarray:
            return join_documents(documents, self.corpus.tokenizer, self.dtype)

        if isinstance(documents[0], np.ndarray):
            return make()
        return self._chunks_of_host.get(json.dumps([self._epoch, state, self._count]), make)

    def _fetch(self) -> Chunk:
        """The next chunk, from the next epoch when this one is at its end."""
        while True:
            state = self._state()
            documents = take_chunk(self._documents)
            if documents:
                break
            if self._seen < self.least:
                raise ConfigError(
                    f"the {self.split} split must fill one global batch: training.global_batch_size sequences of "
                    f"training.seq_len make {self.least} tokens; an epoch of the corpus has {self._seen}.",
                    "Give more text, or lower training.global_batch_size or training.seq_len.",
                )
            self._epoch, self._seen = self._epoch + 1, 0
            if self.epochs and self._epoch >= self.epochs:
                raise ConfigError(
                    f"data.sources.{self.name}.epochs = {self.epochs} is how often the source may be read, and it has "
                    "come to its end.",
                    "Lower its weight or training.steps, raise epochs, or give it more text.",
                )
            self._open(None)
        self._count += len(documents)
        chunk = Chunk(self._epoch, state, self._seen, self._encode(documents, state))
        self._seen += len(chunk.tokens_N)
        return chunk


@dataclass(frozen=True)
class Block:
    """Consecutive windows of a stream, and where the stream stood before them."""

    number: int
    start: dict[str, Any]
    tokens_N: np.ndarray


class StreamWindows:
    """Windows of a token stream, shuffled within blocks. Block b's order is drawn from (seed, b).

    While a block is used, a thread reads the next: tokenising a block takes as long as many steps.

    Args:
        stream: where the tokens come from.
        seq_len: tokens in a sequence; a window has one more.
        seed: of the order.
        block_windows: windows in a block; 1 keeps the stream's order, and reads nothing ahead.
        first_block: number of the first block.
    """

    def __init__(
        self, stream: TokenStream, seq_len: int, seed: int, block_windows: int = BLOCK_WINDOWS, first_block: int = 0
    ) -> None:
        self.stream, self.seq_len, self.seed, self.block_windows = stream, seq_len, seed, block_windows
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[Block] | None = None
        self._use(self._read_block(first_block))

    def with_length(self, seq_len: int) -> StreamWindows:
        """Windows of another length from the next block on; what is left of this block is passed over."""
        start, number = self.stream.position(), self._block.number + 1
        if self._ahead is not None:
            start = self._ahead.result().start
        self.stream.seek(start)
        return StreamWindows(self.stream, seq_len, self.seed, self.block_windows, number)

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """See :class:`moe_dtensor.data.windows.Windows`; every rank reads and tokenises the whole stream."""
        out = np.empty((last - first, self.seq_len + 1), self.stream.dtype)
        for row in range(count):
            if self._place == self.block_windows:
                self._use(self._ahead.result() if self._ahead else self._read_block(self._block.number + 1))
            if first <= row < last:
                start = int(self._order[self._place]) * self.seq_len
                out[row - first] = self._block.tokens_N[start : start + self.seq_len + 1]
            self._place += 1
        return out

    def state(self) -> dict[str, Any]:
        """Start of the block in the stream, and the place in the block."""
        return {**self._block.start, "block": self._block.number, "place": self._place}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`moe_dtensor.data.windows.Windows`."""
        if self._ahead is not None:
            wait([self._ahead])  # it moves the stream
        self.stream.seek({k: state[k] for k in ("epoch", "documents", "seen", "offset")})
        self._use(self._read_block(state["block"]))
        self._place = state["place"]

    def _read_block(self, number: int) -> Block:
        start = self.stream.position()
        return Block(number, start, self.stream.read(self.block_windows * self.seq_len + 1))

    def _use(self, block: Block) -> None:
        self._block, self._place = block, 0
        self._order = np.random.default_rng((self.seed, block.number)).permutation(self.block_windows)
        if self.block_windows > 1:
            self._ahead = self._thread.submit(self._read_block, block.number + 1)
