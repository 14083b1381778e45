"""Global batches, the same on every mesh: tokens, labels and, where asked, document boundaries."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.pack import check_ids, packed
from moe_dtensor.data.stream import BLOCK_WINDOWS, StreamWindows, TokenStream
from moe_dtensor.data.windows import ArrayWindows, Windows

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


class Loader:
    """The stream of global batches of a split; a pure function of config and corpus, whatever rank asks.

    Args:
        config: resolved or not; ``training.{seq_len,global_batch_size,seed}`` and ``data.document_mask`` are used.
        corpus: what :func:`moe_dtensor.data.build_corpus` returns.
        split: ``train`` (order by ``training.seed``) or ``validation`` (one order whatever the seed). Both are endless.

    Raises:
        ConfigError: the split has fewer windows than a global batch has sequences.
    """

    def __init__(self, config: Config, corpus: Any, split: str = "train") -> None:
        self.batch_size = config.training.global_batch_size
        self.document_mask = config.data.document_mask
        self.tokenizer = corpus.tokenizer
        seed = config.training.seed if split == "train" else VALIDATION_SEED
        self.windows: Windows = open_windows(config, corpus, split, seed)
        self.sequences = 0
        """Read so far, by all ranks together."""

    def next_batch(self, first: int, last: int) -> Batch:
        """Sequences ``[first, last)`` of the next global batch; the stream moves on by the whole of it."""
        if not 0 <= first <= last <= self.batch_size:
            raise ValueError(f"[{first}, {last}) is not within the global batch of {self.batch_size} sequences.")
        window_BS1 = self.windows.read(self.batch_size, first, last)
        check_ids(window_BS1, self.tokenizer)  # of a large token file only samples were looked at
        batch = build_batch(window_BS1.astype(np.int64), self.tokenizer.end_id if self.document_mask else None)
        numbers_B = torch.arange(self.sequences + first, self.sequences + last)
        self.sequences += self.batch_size
        return replace(batch, sequence_B=numbers_B)

    def state_dict(self) -> dict[str, str]:
        """The position: one short string, the same on every rank and mesh."""
        return {"position": json.dumps({"windows": self.windows.state(), "sequences": self.sequences})}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        position = json.loads(state["position"])
        self.windows.load_state(position["windows"])
        self.sequences = position["sequences"]


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


def open_windows(config: Config, corpus: Any, split: str, seed: int) -> Windows:
    """The windows of a split, checked to fill a global batch."""
    seq_len, wanted = config.training.seq_len, config.training.global_batch_size
    if getattr(corpus, "streaming", False):
        stream = TokenStream(corpus, split, least=wanted * seq_len + 1)
        return StreamWindows(stream, seq_len, seed, BLOCK_WINDOWS if split == "train" else 1)
    tokens_N = corpus.token_array(split) if hasattr(corpus, "token_array") else packed(corpus, split).tokens_N
    windows = ArrayWindows(tokens_N, seq_len, seed)
    if windows.num_windows < wanted:
        raise ConfigError(
            f"the {split} split must fill one global batch: training.global_batch_size = {wanted} sequences of "
            f"training.seq_len = {seq_len} tokens; data.corpus = {config.data.corpus!r} has {len(tokens_N)} tokens, "
            f"{windows.num_windows} such sequences.",
            REMEDY[split],
        )
    return windows
