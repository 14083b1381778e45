"""Global batches, the same on every mesh: tokens, labels and, where asked, document boundaries; read ahead."""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.stages import sequences_before, span_at, spans
from moe_dtensor.data.corpus import Mixture
from moe_dtensor.data.mixture import MixtureWindows, build_segments
from moe_dtensor.data.pack import FIRST, IDS, PADDING, TRAINED, check_ids, packed
from moe_dtensor.data.stream import BLOCK_WINDOWS, StreamWindows, TokenStream
from moe_dtensor.data.windows import FittedWindows, Windows, cut_windows

IGNORED = -100
VALIDATION_SEED = 0  # the same sequences whatever the run's seed, so that runs compare
REMEDY = {
    "train": "Give more text, or lower training.global_batch_size or training.seq_len.",
    "validation": "Give more text in data.validation_path, or set training.validation_interval = 0.",
}


# B sequences, S seq_len
@dataclass(frozen=True)
class Batch:
    """Sequences of a global batch, int64 on the CPU."""

    tokens_BS: Tensor
    """Inputs."""
    labels_BS: Tensor
    """The next token of each; -100 where it is no target."""
    positions_BS: Tensor | None = None
    """Position of each token in its document, from 0. None without ``data.document_mask``."""
    documents_BS: Tensor | None = None
    """Number of each token's document within the sequence, from 0. None without ``data.document_mask``."""
    sequence_B: Tensor | None = None
    """Number of each sequence in the run, from 0. None: those of a first batch."""
    source_B: Tensor | None = None
    """Which of ``data.sources`` each sequence is from. None without sources."""
    padding_B: Tensor | None = None
    """Tokens of each sequence that are no document's. None without conversations."""


class Loader:
    """The stream of global batches of a split; a pure function of config and corpus, whatever rank asks.

    Args:
        config: resolved or not; ``training.{seq_len,global_batch_size,seed}``, ``data.document_mask``,
            ``data.sources`` and ``stages`` are used.
        corpus: what :func:`moe_dtensor.data.build_corpus` returns.
        split: ``train`` (order by ``training.seed``) or ``validation`` (one order whatever the seed). Both are endless.

    Raises:
        ConfigError: the split has fewer windows than a global batch has sequences.
    """

    def __init__(self, config: Config, corpus: Any, split: str = "train") -> None:
        self.config, self.corpus, self.split = config, corpus, split
        corpora = corpus.corpora if isinstance(corpus, Mixture) else [corpus]
        self.marked = any(getattr(one, "marked", False) for one in corpora)
        for one in corpora:
            if config.data.packing == "best_fit" and getattr(one, "streaming", False):
                raise ConfigError(
                    f"data.packing = best_fit looks at all documents first; {type(one).__name__} is streamed.",
                    "Set data.packing = concatenate, or write token files first: the verb tokenize.",
                )
        self.document_mask = config.data.document_mask
        self.tokenizer = corpus.tokenizer
        self.seed = config.training.seed if split == "train" else VALIDATION_SEED
        self.spans = spans(config) if split == "train" else [span_at(replace(config, stages=()), 1)]
        self._firsts = [sequences_before(config, span.first) for span in self.spans]
        self._span = 0
        self.windows: Windows = self._open_windows()
        if self.marked and not isinstance(corpus, Mixture):
            for length in {span.config.training.seq_len for span in self.spans[1:]}:
                # What is too long for a later stage is told now.
                cut_windows(packed(corpus, split).tokens_N, length, self.seed, config.data, corpus)
        self.sequences = 0
        """Read so far, by all ranks together."""

    @property
    def batch_size(self) -> int:
        """Sequences of the next global batch."""
        self._go_on()
        return self.spans[self._span].config.training.global_batch_size

    def next_batch(self, first: int, last: int) -> Batch:
        """Sequences ``[first, last)`` of the next global batch; the stream moves on by the whole of it."""
        size = self.batch_size
        if not 0 <= first <= last <= size:
            raise ValueError(f"[{first}, {last}) is not within the global batch of {size} sequences.")
        window_BS1 = self.windows.read(size, first, last)
        window_BS1 = window_BS1.astype(np.int64)
        # Of a large token file only samples were looked at.
        check_ids(window_BS1 & IDS if self.marked else window_BS1, self.tokenizer)
        if self.marked:
            batch = build_marked_batch(window_BS1)
        else:
            batch = build_batch(window_BS1, self.tokenizer.end_id if self.document_mask else None)
        numbers_B = torch.arange(self.sequences + first, self.sequences + last)
        self.sequences += size
        source_B = torch.from_numpy(self.windows.source_B) if isinstance(self.windows, MixtureWindows) else None
        return replace(batch, sequence_B=numbers_B, source_B=source_B)

    def tokens_by_source(self) -> dict[str, int]:
        """Tokens that each of ``data.sources`` has given so far; empty without sources."""
        if not isinstance(self.windows, MixtureWindows):
            return {}
        return dict(zip(self.corpus.names, self.windows.tokens_read(), strict=True))

    def close(self) -> None:
        """Give back what streams share with the host's other ranks. Nothing is read afterwards."""
        windows = self.windows.windows().values() if isinstance(self.windows, MixtureWindows) else [self.windows]
        for one in windows:
            if isinstance(one, StreamWindows):
                one.stream.close()

    def told(self) -> str:
        """What packing by best fit makes of the documents; empty without it."""
        fitted = self.windows.windows() if isinstance(self.windows, MixtureWindows) else {"": self.windows}
        lines = {name: w.told() for name, w in fitted.items() if isinstance(w, FittedWindows)}
        return "\n".join(f"{name}: {line}" if name else line for name, line in lines.items())

    def _open_windows(self) -> Windows:
        """The windows of the first span; a mixture's know all spans."""
        if not isinstance(self.corpus, Mixture):
            return open_windows(self.spans[0].config, self.corpus, self.split, self.seed)
        if self.split == "train":
            segments = build_segments(self.config, self.spans)
            total = sequences_before(self.config, self.config.training.steps + 1)
        else:
            segments = build_segments(replace(self.config, stages=()), self.spans)
            total = self.config.training.validation_sequences or self.config.training.global_batch_size
        return MixtureWindows(self.corpus, self.split, segments, self.seed, total, self.config.data)

    def _go_on(self) -> None:
        """Enter the span that the next sequence belongs to."""
        while self._span + 1 < len(self.spans) and self.sequences >= self._firsts[self._span + 1]:
            self._enter(self._span + 1)

    def _enter(self, index: int) -> None:
        """Take up a span: windows of another length start again, a stream goes on where it is."""
        before, now = self.spans[self._span].config, self.spans[index].config
        self._span = index
        if isinstance(self.windows, MixtureWindows) or now.training.seq_len == before.training.seq_len:
            return
        if isinstance(self.windows, StreamWindows):
            self.windows = self.windows.with_length(now.training.seq_len)
        else:
            self.windows = open_windows(now, self.corpus, self.split, self.seed, key=("stage", index))

    def state_dict(self) -> dict[str, str]:
        """The position: one short string, the same on every rank and mesh."""
        return {"position": json.dumps({"windows": self.windows.state(), "sequences": self.sequences})}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        position = json.loads(state["position"])
        self.sequences = position["sequences"]
        # At a border the sequence read last decides; the next batch enters the next span.
        index = max(i for i, first in enumerate(self._firsts) if first < self.sequences or i == 0)
        if index < self._span:
            self._span, self.windows = 0, self._open_windows()
        while self._span < index:
            self._enter(self._span + 1)
        self.windows.load_state(position["windows"])


def build_batch(window_BS1: np.ndarray, end_id: int | None) -> Batch:
    """Cut windows (B, S + 1) into tokens and labels; with ``end_id`` mark documents.

    A document's end token still belongs to it. What follows an end token cannot be foretold across the mask, so the
    end token's label is ignored. A document cut by the window's start counts from position 0 there.
    """
    tokens_BS = torch.from_numpy(window_BS1[:, :-1].copy())
    labels_BS = torch.from_numpy(window_BS1[:, 1:].copy())
    if end_id is None:
        return Batch(tokens_BS, labels_BS)
    is_end_BS = tokens_BS == end_id
    labels_BS[is_end_BS] = IGNORED
    documents_BS = is_end_BS.cumsum(1) - is_end_BS.long()
    index_S = torch.arange(tokens_BS.shape[1])
    # The start of a document is the index after the latest end token before it.
    after_end_BS = torch.where(is_end_BS, index_S + 1, 0)
    start_BS = torch.nn.functional.pad(after_end_BS.cummax(1).values[:, :-1], (1, 0))
    return Batch(tokens_BS, labels_BS, index_S - start_BS, documents_BS)


def build_marked_batch(window_BS1: np.ndarray) -> Batch:
    """Cut marked windows (B, S + 1) into tokens and labels: of trained tokens, and none from one document to the next.

    Padding is a document for each token.
    """
    marked_BS1 = torch.from_numpy(window_BS1)
    id_BS1 = marked_BS1 & IDS
    first_BS1 = (marked_BS1 & FIRST) > 0
    is_target_BS = ((marked_BS1 & TRAINED) > 0)[:, 1:] & ~first_BS1[:, 1:]
    documents_BS = first_BS1[:, 1:-1].cumsum(1)
    documents_BS = torch.nn.functional.pad(documents_BS, (1, 0))
    index_S = torch.arange(id_BS1.shape[1] - 1)
    start_BS = torch.where(first_BS1[:, :-1], index_S, 0).cummax(1).values
    return Batch(
        id_BS1[:, :-1].clone(),
        torch.where(is_target_BS, id_BS1[:, 1:], IGNORED),
        index_S - start_BS,
        documents_BS,
        padding_B=((marked_BS1[:, :-1] & PADDING) > 0).sum(1),
    )


def open_windows(config: Config, corpus: Any, split: str, seed: int, key: tuple[object, ...] | None = None) -> Windows:
    """The windows of a split, checked to fill a global batch; ``key`` as for :class:`ArrayWindows`."""
    seq_len, wanted = config.training.seq_len, config.training.global_batch_size
    if getattr(corpus, "streaming", False):
        stream = TokenStream(corpus, split, least=wanted * seq_len + 1)
        return StreamWindows(stream, seq_len, seed, BLOCK_WINDOWS if split == "train" else 1)
    tokens_N = corpus.token_array(split) if hasattr(corpus, "token_array") else packed(corpus, split).tokens_N
    windows = cut_windows(tokens_N, seq_len, seed, config.data, corpus, key)
    if windows.num_windows < wanted:
        raise ConfigError(
            f"the {split} split must fill one global batch: training.global_batch_size = {wanted} sequences of "
            f"training.seq_len = {seq_len} tokens; data.corpus = {config.data.corpus!r} has {len(tokens_N)} tokens, "
            f"{windows.num_windows} such sequences.",
            REMEDY[split],
        )
    return windows


DEPTH = 4  # batches that wait at most


@dataclass(frozen=True)
class Ready:
    """A batch, and where the loader stood after it."""

    batch: Batch
    state: dict[str, str]
    tokens_by_source: dict[str, int]


class Prefetcher:
    """This rank's share of a loader's batches, read ahead of their use. Its position is that of what was taken.

    Args:
        loader: read by the thread alone from now on.
        dp_rank: which share of each global batch.
        dp: of how many.
        depth: batches that wait at most.
    """

    def __init__(self, loader: Loader, dp_rank: int, dp: int, depth: int = DEPTH) -> None:
        self.loader, self.dp_rank, self.dp, self.depth = loader, dp_rank, dp, depth
        self._state = loader.state_dict()
        self._thread: threading.Thread | None = None
        self.wait_seconds = 0.0
        """What the latest :meth:`next` waited."""
        self.tokens_by_source: dict[str, int] = loader.tokens_by_source()

    def next(self) -> Batch:
        """The next batch; what the reading raised is raised here."""
        if self._thread is None:
            self._start()
        start = time.perf_counter()
        ready = self._queue.get()
        self.wait_seconds = time.perf_counter() - start
        if isinstance(ready, BaseException):
            self.close()
            raise ready
        self._state, self.tokens_by_source = ready.state, ready.tokens_by_source
        return ready.batch

    def state_dict(self) -> dict[str, str]:
        """The position after the batch taken last, as the loader's."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.close()
        self.loader.load_state_dict(state)
        self._state, self.tokens_by_source = self.loader.state_dict(), self.loader.tokens_by_source()

    def close(self) -> None:
        """End the thread; what it had read ahead is dropped, so load a state before going on."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():
            try:  # it may wait for room
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()
        self._thread = None

    def _start(self) -> None:
        self._queue: queue.Queue[Ready | BaseException] = queue.Queue(self.depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(self._queue, self._stop), daemon=True)
        self._thread.start()

    def _read(self, ready: queue.Queue[Ready | BaseException], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                share = self.loader.batch_size // self.dp
                batch = self.loader.next_batch(self.dp_rank * share, (self.dp_rank + 1) * share)
                ready.put(Ready(batch, self.loader.state_dict(), self.loader.tokens_by_source()))
        except BaseException as error:  # told to whoever takes the next batch
            ready.put(error)
