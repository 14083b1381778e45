"""A step's microbatches one after the other: pp = 1. B sequences, S positions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.estimate.memory import settle_accumulate
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.fsdp import next_microbatch


class Runner(Protocol):
    """What runs a step's microbatches on one rank."""

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward over this rank's sequences; its summed loss times ``scale``, a scalar."""

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only; the summed loss, a scalar."""

    def close(self) -> None:
        """Let go of what may not outlive the process group. After the last step."""


Arguments = tuple[Tensor | None, ...]
"""Of the model for one microbatch: tokens, labels, positions, documents, None, sequence numbers."""


def split(batch: Batch, size: int) -> list[tuple[Tensor | None, ...]]:
    """Cut a batch into microbatches of ``size`` sequences: the arguments of the model for each."""
    fields = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS, None, batch.sequence_B)
    count = batch.tokens_BS.shape[0] // size
    return list(zip(*([None] * count if x is None else x.split(size) for x in fields), strict=True))


class Accumulation:
    """pp = 1: one microbatch after the other, gradients reduced with the last, or with each (``fsdp.accumulate``)."""

    def __init__(self, part: Transformer, config: Config) -> None:
        self.part = part
        self.config = settle_accumulate(config)

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward; the summed loss times ``scale``, a scalar."""
        chunks = split(batch, self.config.training.microbatch_size)
        losses = []
        for i, arguments in enumerate(chunks):
            next_microbatch(self.part, self.config, last=i == len(chunks) - 1)
            loss = self.part(*arguments).sum() * scale
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only; the summed loss."""
        chunks = split(batch, self.config.training.microbatch_size)
        return torch.stack([self.part(*arguments).sum() for arguments in chunks]).sum()

    def close(self) -> None:
        """Nothing is held."""
