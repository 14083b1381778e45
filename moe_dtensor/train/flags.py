"""What the host has to know of a step, without making it wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class DelayedFlag:
    """A flag of every step, the same on all ranks; read one step late on a GPU, where this step is not computed yet."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, flag: Tensor) -> bool:
        """Whether the flag of this step (CPU) or of the one before (GPU) is above 0."""
        if not self._on_gpu:
            return bool(flag > 0)
        copy = torch.empty((), dtype=flag.dtype, pin_memory=True)
        copy.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self._before = self._before, (copy, event)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)


class Skips:
    """Steps skipped in a row, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self._row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, finite: Tensor) -> None:
        """Count a step in."""
        self._row = torch.where(finite, torch.zeros_like(self._row), self._row + 1)
        self._longest = torch.maximum(self._longest, self._row)

    def now(self) -> int:
        """Steps skipped in a row up to the last; waits for the device."""
        return int(self._row)

    def longest(self) -> int:
        """The longest row so far; waits for the device."""
        return int(self._longest)
