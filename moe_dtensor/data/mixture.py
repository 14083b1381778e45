"""Windows of several sources: whose sequence comes when, and which of its windows. B sequences of a batch, S seq_len.

Turns meet their sources' shares at every n. Job j of a source of share w may take place n from
``floor((j - 1) / w) + 1`` to ``ceil(j / w)``; each place takes the open job whose last place comes first. Then after
any n places every source has had less than one more or less than ``w n`` (Baruah, Cohen, Plaxton and Varvel,
Proportionate Progress, 1996).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data
from moe_dtensor.config.stages import Span, sequences_before
from moe_dtensor.data.corpus import Mixture
from moe_dtensor.data.pack import mark_documents, packed
from moe_dtensor.data.stream import BLOCK_WINDOWS, StreamWindows, TokenStream
from moe_dtensor.data.windows import ArrayWindows, cut_windows

LARGEST_TOTAL = 1 << 30


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
