"""Several sources as one: whose sequence comes when, and which of its windows. B sequences of a batch, S seq_len."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data, Source
from moe_dtensor.config.stages import Span, sequences_before
from moe_dtensor.data.files import check_apart
from moe_dtensor.data.fit import cut_windows
from moe_dtensor.data.marks import mark_documents
from moe_dtensor.data.order import Turns, whole_weights
from moe_dtensor.data.pack import packed
from moe_dtensor.data.stream import BLOCK_WINDOWS, StreamWindows, TokenStream
from moe_dtensor.data.tokenizer import Tokenizer
from moe_dtensor.data.windows import ArrayWindows


class Mixture:
    """The corpora of ``[[data.sources]]``.

    Raises:
        ConfigError: one trains on what another holds out.
    """

    def __init__(self, sources: tuple[Source, ...], corpora: list[Any], tokenizer: Tokenizer) -> None:
        self.sources, self.corpora, self.tokenizer = sources, corpora, tokenizer
        self.names = [source.name for source in sources]
        for one in corpora:
            for other in corpora:
                check_apart(paths(one, "files"), paths(other, "validation_files"), "data.sources")

    def documents(self, split: str) -> Iterator[Any]:
        """The documents of one source after the other."""
        for corpus in self.corpora:
            yield from corpus.documents(split)

    def fingerprint(self) -> str:
        """Of all sources with their names."""
        prints = [(name, corpus.fingerprint()) for name, corpus in zip(self.names, self.corpora, strict=True)]
        return hashlib.blake2b(repr(prints).encode(), digest_size=16).hexdigest()


def paths(corpus: Any, attribute: str) -> list[str]:
    """The files that a corpus reads as text."""
    return list(getattr(getattr(corpus, attribute, None), "taken", ()))


def source_config(config: Config, source: Source) -> Config:
    """The config of a source by itself."""
    data = config.data
    return replace(
        config,
        data=replace(
            data,
            corpus=source.corpus,
            path=source.path,
            validation_path=source.validation_path,
            text_key=source.text_key or data.text_key,
            split=source.split or data.split,
            revision=source.revision,
            sources=(),
        ),
        stages=(),
    )


@dataclass(frozen=True)
class Segment:
    """Sequences of a run with the same weights and the same length."""

    first: int
    """Number of its first sequence in the run."""
    seq_len: int
    generation: int
    """How often the length has changed before."""
    turns: Turns
    read: tuple[int, ...]
    """Windows of this length that each source has given before."""
    tokens: tuple[int, ...]
    """Tokens that each source has given before."""


def build_segments(config: Config, found: list[Span]) -> list[Segment]:
    """The segments of a run's spans."""
    segments: list[Segment] = []
    weights: tuple[float, ...] = ()
    for span in found:
        seq_len = span.config.training.seq_len
        first = sequences_before(config, span.first)
        if not segments:
            zeros = (0,) * len(span.weights)
            segments.append(Segment(first, seq_len, 0, Turns(whole_weights(span.weights)), zeros, zeros))
        elif span.weights != weights or seq_len != segments[-1].seq_len:
            last = segments[-1]
            counts = last.turns.counts_at(first - last.first)
            same = seq_len == last.seq_len
            read = tuple(r + c if same else 0 for r, c in zip(last.read, counts, strict=True))
            tokens = tuple(t + c * last.seq_len for t, c in zip(last.tokens, counts, strict=True))
            turns = Turns(whole_weights(span.weights))
            segments.append(Segment(first, seq_len, last.generation + (not same), turns, read, tokens))
        weights = span.weights
    return segments


class MixtureWindows:
    """Windows of a mixture. Sequence n of the run is a function of seed and n alone, but for streamed sources, which
    are read in their order.

    Args:
        mixture: the sources.
        split: ``train`` or ``validation``.
        segments: of the run.
        seed: of the order.
        total: sequences that will be read, to check that the sources have them.
        data: how documents are packed.

    Raises:
        ConfigError: a source has no window, or would be read more often than its ``epochs`` allow.
    """

    def __init__(
        self, mixture: Mixture, split: str, segments: list[Segment], seed: int, total: int, data: Data
    ) -> None:
        self.mixture, self.split, self.segments, self.seed, self.data = mixture, split, segments, seed, data
        self.marked = any(getattr(corpus, "marked", False) for corpus in mixture.corpora)
        self.position = 0
        self.source_B = np.empty(0, np.int64)
        """Source of each sequence of the latest read."""
        self._streams: dict[str, StreamWindows] = {}
        self._arrays = {
            name: corpus.token_array(split) if hasattr(corpus, "token_array") else packed(corpus, split).tokens_N
            for name, corpus in zip(mixture.names, mixture.corpora, strict=True)
            if not getattr(corpus, "streaming", False)
        }
        self._made: dict[tuple[str, int], ArrayWindows] = {}
        self._check_epochs(total)
        self._enter(segments[0], 0)

    def _enter(self, segment: Segment, place: int) -> None:
        """Take up a segment at its sequence ``place``."""
        self.segment = segment
        segment.turns.seek(place)
        self._windows: dict[str, ArrayWindows | StreamWindows] = {
            name: self._cut(name, segment) for name in self._arrays
        }
        for source, corpus in zip(self.mixture.sources, self.mixture.corpora, strict=True):
            if source.name in self._arrays:
                continue
            stream = self._streams.get(source.name)
            if stream is None:
                tokens = TokenStream(corpus, self.split, segment.seq_len + 1, source.epochs, source.name)
                stream = StreamWindows(
                    tokens, segment.seq_len, self.seed, BLOCK_WINDOWS if self.split == "train" else 1
                )
            elif stream.seq_len != segment.seq_len:
                stream = stream.with_length(segment.seq_len)
            self._streams[source.name] = self._windows[source.name] = stream

    def read(self, count: int, first: int, last: int) -> np.ndarray:
        """See :class:`moe_dtensor.data.windows.Windows`; of arrays only the asked windows are touched."""
        for segment in self.segments:
            if self.segment.first < segment.first <= self.position:
                self._enter(segment, 0)
        taken = self.segment.turns.take(count)
        out = np.empty((last - first, self.segment.seq_len + 1), np.int64)
        for index, name in enumerate(self.mixture.names):
            rows = [row for row, (source, _) in enumerate(taken) if source == index]
            windows = self._windows[name]
            if isinstance(windows, StreamWindows):
                read = self._marked(index, windows.read(len(rows), 0, len(rows)))
                kept = [i for i, row in enumerate(rows) if first <= row < last]
                out[[rows[i] - first for i in kept]] = read[kept]
            else:
                rows = [row for row in rows if first <= row < last]
                before = self.segment.read[index]
                read = windows.rows([before + taken[row][1] for row in rows])
                out[[row - first for row in rows]] = self._marked(index, read)
        self.source_B = np.array([source for source, _ in taken[first:last]], np.int64)
        self.position += count
        return out

    def _marked(self, index: int, window_BS1: np.ndarray) -> np.ndarray:
        """Windows of a source; those of plain documents get marks where another source has them."""
        if not self.marked or getattr(self.mixture.corpora[index], "marked", False):
            return window_BS1
        return mark_documents(window_BS1, self.mixture.tokenizer.end_id)

    def _cut(self, name: str, segment: Segment) -> ArrayWindows:
        """The windows of a source that is an array."""
        key = (name, segment.generation)
        if key not in self._made:
            corpus = self.mixture.corpora[self.mixture.names.index(name)]
            tokens_N = self._arrays[name]
            self._made[key] = cut_windows(tokens_N, segment.seq_len, self.seed, self.data, corpus, key)
        return self._made[key]

    def windows(self) -> Mapping[str, ArrayWindows | StreamWindows]:
        """The windows of each source in the present segment."""
        return self._windows

    def tokens_read(self) -> list[int]:
        """Tokens that each source has given so far."""
        counts = self.segment.turns.counts
        return [t + c * self.segment.seq_len for t, c in zip(self.segment.tokens, counts, strict=True)]

    def state(self) -> dict[str, Any]:
        """Sequences read so far, and the place in each streamed source."""
        return {"position": self.position, "streams": {n: s.state() for n, s in self._streams.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`moe_dtensor.data.windows.Windows`."""
        self.position = state["position"]
        # At a border the sequence read last decides: the next read goes on to the next segment.
        segment = [s for s in self.segments if s.first < self.position or s is self.segments[0]][-1]
        self._streams = {
            name: stream if stream.seq_len == segment.seq_len else stream.with_length(segment.seq_len)
            for name, stream in self._streams.items()
        }
        for name, place in state["streams"].items():
            self._streams[name].load_state(place)
        self._enter(segment, self.position - segment.first)

    def _check_epochs(self, total: int) -> None:
        """Raise where an array is too small for what the run takes from it."""
        ends = [*(s.first for s in self.segments[1:]), total]
        epochs = dict.fromkeys(self._arrays, 0.0)
        for segment, end in zip(self.segments, ends, strict=True):
            counts = segment.turns.counts_at(max(0, end - segment.first))
            for name, tokens_N in self._arrays.items():
                count, windows = counts[self.mixture.names.index(name)], self._cut(name, segment).num_windows
                if windows == 0:
                    raise ConfigError(
                        f"data.sources.{name}: the {self.split} split must fill one sequence of training.seq_len = "
                        f"{segment.seq_len} tokens; it has {len(tokens_N)}.",
                        "Give the source more text, or lower training.seq_len.",
                    )
                epochs[name] += count / windows
        for source in self.mixture.sources:
            limit = 1.0 if self.split == "validation" else source.epochs
            if limit and epochs.get(source.name, 0.0) > limit:
                why = "held-out text is read once" if self.split == "validation" else f"epochs = {limit} allows less"
                raise ConfigError(
                    f"data.sources.{source.name}: the run would read its {self.split} split "
                    f"{epochs[source.name]:.2f} times; {why}.",
                    "Lower its weight, training.steps or training.validation_sequences, or give it more text"
                    + (", or raise epochs." if self.split == "train" else "."),
                )
