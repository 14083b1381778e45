"""What is measured beside the steps: the validation loss, the texts of ``[eval]``, samples of text.

R rows, B prompts, S seq_len, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_dtensor.config.schema import Config
from moe_dtensor.data import Corpus, Loader
from moe_dtensor.data.loader import IGNORED, Batch
from moe_dtensor.data.tokenizer import Tokenizer, files_beside
from moe_dtensor.data.windows import best_fit
from moe_dtensor.evaluate.score import Request
from moe_dtensor.evaluate.text import Encoder, TextResult, prepare_text, read_text
from moe_dtensor.generate.batch import Sampler, Sampling
from moe_dtensor.generate.decoder import whole_vocabulary
from moe_dtensor.kernels.cross_entropy import held_ids
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.routing import load_metrics
from moe_dtensor.train.step import evaluate_batches, read_batch, to_device


@dataclass(frozen=True)
class PackedText:
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
        self._rows: dict[str, PackedText] = {}
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

    def _cut(self, length: int) -> dict[str, PackedText]:
        """The sets in rows of the present sequence length."""
        if length != self._length:
            self._rows = {name: self._pack(texts, length) for name, texts in self._texts.items()}
            self._length = length
        return self._rows

    def _pack(self, texts: list[str], length: int) -> PackedText:
        text = prepare_text(texts, self._encoder, length, length)
        return PackedText(text.documents, text.bytes, text.tokens, *pack(text.requests, length))


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


def _batches(trainer: Trainer, rows: PackedText) -> Iterator[Batch]:
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


class Samples:
    """The prompts, and how they are continued. Nothing is remembered between tokens: each is a forward pass of
    evaluation, of the shape of a microbatch, which every mesh with pp = 1 can take.

    Args:
        config: of the run.
        tokenizer: of the run.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        training = config.training
        self.prompts = training.sample_prompts
        self.count = training.sample_tokens
        self.sampling = Sampling(training.sample_temperature, seed=training.seed)
        self.tokenizer = tokenizer
        encoded = tokenizer.encode_batch(list(self.prompts)) if self.prompts else []
        self.ids = [[int(i) for i in ids] or [tokenizer.end_id] for ids in encoded]

    def write(self, trainer: Trainer) -> dict[str, str]:
        """The continuation of each prompt up to its end, or to so many tokens. Called by all ranks together; every dp
        rank writes all of them."""
        training = trainer.config.training
        kept = [ids[-(training.seq_len - self.count) :] for ids in self.ids]
        rows = -(-len(kept) // training.microbatch_size) * training.microbatch_size
        tokens_BS = torch.zeros(rows, training.seq_len, dtype=torch.int64)
        for row in range(rows):
            ids = kept[row % len(kept)]
            tokens_BS[row, : len(ids)] = torch.tensor(ids)
        last_B = torch.tensor([len(kept[row % len(kept)]) - 1 for row in range(rows)])
        # Drawn in the same way each time, so that what differs is the model.
        sampler = Sampler(self.sampling, range(rows))
        for _ in range(self.count):
            new_B = sampler(next_logits(trainer, tokens_BS, last_B)).cpu()
            last_B = last_B + 1
            tokens_BS[torch.arange(rows), last_B] = new_B
        made = [tokens_BS[row, len(ids) : len(ids) + self.count].tolist() for row, ids in enumerate(kept)]
        return {prompt: self._text(ids) for prompt, ids in zip(self.prompts, made, strict=True)}

    def _text(self, ids: list[int]) -> str:
        end = self.tokenizer.end_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


@torch.no_grad()
def next_logits(trainer: Trainer, tokens_BS: Tensor, last_B: Tensor) -> Tensor:
    """Logits ``(B, V)`` after position ``last_B`` of each sequence, the same on all ranks."""
    (part,) = trainer.parts
    rows = torch.arange(len(tokens_BS))
    labels_BS = torch.full_like(tokens_BS, IGNORED)
    labels_BS[rows, last_B] = 0
    token_loss, seen = part.token_loss, []

    def watch(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        held = held_ids(part.vocab_size, part.first_row, logits_BSV.shape[-1])
        asked_BV = logits_BSV[labels_BS != IGNORED][..., :held]
        seen.append(whole_vocabulary(asked_BV[:, None], trainer.config, trainer.mesh["tp"])[:, 0])
        return torch.zeros_like(labels_BS, dtype=torch.float32)

    part.token_loss = watch
    part.eval()
    try:
        trainer.runner.evaluate(to_device(Batch(tokens_BS, labels_BS, sequence_B=rows), trainer.device))
    finally:
        part.token_loss = token_loss
        part.train()
    return torch.cat(seen)


@dataclass
class HeldOut:
    """Read before the first step, so that what is wrong is told then."""

    config: Config
    """Of the run; resolved."""
    corpus: Corpus
    loader: Loader | None
    """Of the validation split, where it is measured."""
    evaluation: Evaluation | None
    samples: Samples | None

    def is_due(self, step: int) -> bool:
        """Whether something is measured after a step."""
        return self._validates(step) or self._evaluates(step)

    def measure(self, trainer: Trainer, step: int) -> dict[str, Value]:
        """By name what is due after a step. Called by all ranks together."""
        values: dict[str, Value] = {}
        if self._validates(step):
            values |= self._validate(trainer)
        if self.evaluation is not None and self._evaluates(step):
            values |= self.evaluation.measure(trainer)
        if self.samples is not None:
            values["samples"] = self.samples.write(trainer)
        return values

    def enter_stage(self, config: Config) -> None:
        """Go on with the sizes of a stage."""
        if self.loader is not None:
            self.loader = Loader(replace(config, stages=()), self.corpus, "validation")

    def _validates(self, step: int) -> bool:
        return self.loader is not None and step % self.config.training.validation_interval == 0

    def _evaluates(self, step: int) -> bool:
        return self.evaluation is not None and step % self.evaluation.interval == 0

    def _validate(self, trainer: Trainer) -> dict[str, Value]:
        """Mean loss of the targets in ``training.validation_sequences`` held-out sequences, the same every time."""
        loader = self.loader
        assert loader is not None
        start = loader.state_dict()
        training = trainer.config.training
        batches = training.validation_sequences // training.global_batch_size
        found = evaluate_batches(trainer, (read_batch(trainer, loader) for _ in range(batches)))
        loader.load_state_dict(start)
        return {"validation_loss": found.mean, **load_metrics("validation_", found.load_LE)}


def build_held_out(config: Config, corpus: Corpus) -> HeldOut:
    """All that ``config`` (resolved) asks for.

    Raises:
        ConfigError: a split that is too small, a text that cannot be read.
    """
    return HeldOut(
        config,
        corpus,
        Loader(config, corpus, "validation") if config.training.validation_interval else None,
        Evaluation(config, corpus.tokenizer) if config.eval.interval else None,
        Samples(config, corpus.tokenizer) if config.training.sample_prompts else None,
    )
