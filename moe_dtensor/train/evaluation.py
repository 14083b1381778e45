"""The texts of ``[[eval.sets]]``, measured as training goes. R rows, S seq_len."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moe_dtensor.config.schema import Config
from moe_dtensor.data.fit import best_fit
from moe_dtensor.data.loader import IGNORED, Batch
from moe_dtensor.data.tokenizer import Tokenizer, files_beside
from moe_dtensor.evaluate.encoder import Encoder
from moe_dtensor.evaluate.score import Request
from moe_dtensor.evaluate.text import TextResult, prepare_text, read_text
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.routing import load_metrics
from moe_dtensor.train.step import evaluate_batches, to_device


@dataclass(frozen=True)
class Rows:
    """A text in rows of one length: several windows in each, apart by the document mask. Its losses are those of the
    windows alone, as the verb ``eval`` scores them."""

    documents: int
    bytes: int
    tokens: int
    tokens_RS: np.ndarray
    labels_RS: np.ndarray
    positions_RS: np.ndarray
    documents_RS: np.ndarray


class Evaluation:
    """All sets, read once and the same on every rank.

    Args:
        config: resolved.
        tokenizer: of the run.

    Raises:
        ConfigError: a file that cannot be read, or has no text.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.interval = config.eval.interval
        data = config.data
        self._texts = {
            one.name: read_text(
                f"eval.sets.{one.name}.path", one.path, one.text_key or data.text_key, data.max_bad_records
            )
            for one in config.eval.sets
        }
        self._encoder = Encoder(tokenizer, files_beside(data.tokenizer))
        self._rows: dict[str, Rows] = {}
        self._length = 0

    def measure(self, trainer: Trainer) -> dict[str, Value]:
        """Loss and bits per byte of each set, and how evenly all of them were routed. Called by all ranks together."""
        results, load_LE = [], None
        for rows in self._cut(trainer.config.training.seq_len).values():
            found = evaluate_batches(trainer, _batches(trainer, rows))
            load_LE = found.load_LE if load_LE is None else load_LE + found.load_LE
            results.append(TextResult(rows.documents, rows.bytes, rows.tokens, -float(found.loss)))
        assert load_LE is not None
        values: dict[str, Value] = {"eval_loss": torch.tensor([r.loss for r in results], dtype=torch.float64)}
        if trainer.config.training.loss == "cross_entropy":  # another loss is not in nats
            bits = [result.bits_per_byte for result in results]
            values["eval_bits_per_byte"] = torch.tensor(bits, dtype=torch.float64)
        return values | load_metrics("eval_", load_LE)

    def _cut(self, length: int) -> dict[str, Rows]:
        """The sets in rows of the present sequence length."""
        if length != self._length:
            self._rows = {name: self._pack(texts, length) for name, texts in self._texts.items()}
            self._length = length
        return self._rows

    def _pack(self, texts: list[str], length: int) -> Rows:
        text = prepare_text(texts, self._encoder, length, length)
        return Rows(text.documents, text.bytes, text.tokens, *pack(text.requests, length))


def pack(requests: list[Request], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Windows in rows, each where it fits best: tokens, labels, positions and document numbers ``(R, S)``.

    What a row leaves open is filled with tokens from the front of all of them, which are no targets: so that the
    routing's load stays that of the text.
    """
    lengths = np.array([len(request.tokens) - 1 for request in requests])
    row_N = best_fit(lengths, length)
    shape = (int(row_N.max(initial=-1)) + 1, length)
    tokens_RS = np.resize(np.concatenate([request.tokens for request in requests]), shape)
    labels_RS = np.full(shape, IGNORED)
    positions_RS, documents_RS = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    filled, count = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    for request, row in zip(requests, row_N.tolist(), strict=True):
        size, start = len(request.tokens) - 1, filled[row]
        tokens_RS[row, start : start + size] = request.tokens[:-1]
        labels_RS[row, start + size - request.scored : start + size] = request.tokens[-request.scored :]
        positions_RS[row, start : start + size] = np.arange(size)
        documents_RS[row, start : start + size] = count[row]
        filled[row] += size
        count[row] += 1
    for row in range(shape[0]):
        positions_RS[row, filled[row] :] = np.arange(length - filled[row])
        documents_RS[row, filled[row] :] = count[row]
    return tokens_RS, labels_RS, positions_RS, documents_RS


def _batches(trainer: Trainer, rows: Rows) -> Iterator[Batch]:
    """This dp rank's share of each batch: as many microbatches as in training, fewer in the last. Every rank runs as
    many as the others; rows that are missing are the first ones again, without targets."""
    training, dp = trainer.config.training, trainer.config.mesh.dp
    unit = dp * training.microbatch_size
    total = -(-len(rows.tokens_RS) // unit) * unit
    for first in range(0, total, training.global_batch_size):
        each = min(training.global_batch_size, total - first) // dp
        start = first + trainer.mesh["dp"].get_local_rank() * each
        number_B = np.arange(start, start + each)
        row_B = number_B % len(rows.tokens_RS)
        labels_BS = torch.from_numpy(rows.labels_RS[row_B])
        labels_BS[torch.from_numpy(number_B >= len(rows.tokens_RS))] = IGNORED
        batch = Batch(
            torch.from_numpy(rows.tokens_RS[row_B].astype(np.int64)),
            labels_BS,
            torch.from_numpy(rows.positions_RS[row_B]),
            torch.from_numpy(rows.documents_RS[row_B]),
            torch.from_numpy(number_B),
        )
        yield to_device(batch, trainer.device)
