"""What a training step asks of whatever runs its microbatches."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe_dtensor.data.loader import Batch


class Runner(Protocol):
    """What runs a step's microbatches on one rank."""

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward over this rank's sequences; its summed loss times ``scale``, a scalar."""

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only; the summed loss, a scalar."""
