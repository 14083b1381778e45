"""Turns what a step returns into records, with one read from the device per logging interval, and none in between."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config
from moe_dtensor.config.stages import tokens_through
from moe_dtensor.parallel.graphed import peak_memory
from moe_dtensor.train.sinks import Record, Sink

# Dense bf16 tensor-core FLOP/s by a fragment of the device's name, from the makers' data sheets (without
# sparsity). The first fragment that fits counts.
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


Value = Tensor | float | str | dict[str, str]
"""What a step hands over."""
Read = float | str | list[float] | dict[str, str]
"""The same on the host."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet; None on CPUs and for cards not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for fragment, flops in _PEAK_FLOPS if fragment in name), None)


class Meter:
    """Collects each step's values and hands one record per step to the sinks, on rank 0.

    Values stay on the device until ``metrics.log_interval`` steps are together (or :meth:`flush`); then
    one copy brings them over. So times, throughput and memory are the mean (the peak) over the interval.

    Args:
        config: ``[metrics]`` and the batch's size.
        device: of this rank.
        sinks: where records go. Empty, as on ranks other than 0: nothing is read or kept.
        world_size: ranks that share the work, for MFU.
        flops_per_token: forward and backward FLOPs of one token; 0 leaves MFU out.
        layers: block indices that name the entries of vector values, in their order.
        names: other names of the entries, by the value's name; entries that are not a number are left out.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        sinks: Sequence[Sink],
        world_size: int = 1,
        flops_per_token: float = 0.0,
        layers: Sequence[int] = (),
        names: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._device = device
        self._sinks = sinks
        self._log_interval = config.metrics.log_interval
        self._config = config
        self._layers = [str(layer) for layer in layers]
        self._names = names
        self._peak = (peak_flops(device) or 0.0) * world_size
        self._flops_per_token = flops_per_token
        self._steps: list[tuple[int, dict[str, Value]]] = []
        self._since = time.perf_counter()

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Take the values of a finished step.

        Args:
            step: its number, from 1.
            values: by name; numbers, texts (one, or several by name), tensors of one element, or vectors with one entry
                for each of ``layers``. Tensors must not be written to later.
        """
        if not self._sinks:
            return
        self._steps.append((step, dict(values)))
        if step % self._log_interval == 0:
            self.flush()

    def flush(self) -> None:
        """Write the records of all steps so far. Call before a checkpoint, so that none is missing after a resume."""
        if not self._steps:
            return
        records = [{"step": step, **self._named(values)} for step, values in _read(self._steps, self._device)]
        now = time.perf_counter()
        last, before = records[-1]["step"], records[0]["step"] - 1
        tokens = tokens_through(self._config, last) - tokens_through(self._config, before)
        shared = self._measure((now - self._since) / len(records), tokens / len(records))
        self._since = now
        self._steps = []
        for record in records:
            record = {**record, "tokens": tokens_through(self._config, record["step"]), **shared}
            for sink in self._sinks:
                sink.log(record)

    def enter_stage(self, flops_per_token: float) -> None:
        """Write what is left, and go on with a token's FLOPs at another sequence length."""
        self.flush()
        self._flops_per_token = flops_per_token

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (a checkpoint, a validation) does not count as time of the steps."""
        if self._sinks and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        """Write what is left and close the sinks."""
        self.flush()
        for sink in self._sinks:
            sink.close()

    def _named(self, values: Mapping[str, Read]) -> Record:
        """Vectors become dicts by layer, or by their own names."""
        record: Record = {}
        for name, value in values.items():
            if isinstance(value, list):
                entries = zip(self._names.get(name, self._layers), value, strict=True)
                record[name] = {key: x for key, x in entries if name not in self._names or not math.isnan(x)}
            else:
                record[name] = value
        return record

    def _measure(self, step_seconds: float, step_tokens: float) -> Record:
        tokens_per_second = step_tokens / step_seconds
        measured = {
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "peak_memory_gib": _peak_memory(self._device, self._config) / 2**30,
        }
        if self._peak and self._flops_per_token:
            measured["mfu"] = self._flops_per_token * tokens_per_second / self._peak
        return measured


def _read(
    steps: Sequence[tuple[int, Mapping[str, Value]]], device: torch.device
) -> Iterator[tuple[int, dict[str, Read]]]:
    """The steps with tensors as numbers, through one copy from the device."""
    tensors = [value for _, values in steps for value in values.values() if isinstance(value, Tensor)]
    # float64 holds every narrower value as it is.
    parts = [tensor.detach().reshape(-1).to(device, torch.float64) for tensor in tensors]
    joined = torch.cat(parts).tolist() if parts else []
    position = 0
    for step, values in steps:
        numbers: dict[str, Read] = {}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                numbers[name] = value
                continue
            entries = joined[position : position + value.numel()]
            position += value.numel()
            numbers[name] = entries if value.ndim else entries[0]
        yield step, numbers


def _peak_memory(device: torch.device, config: Config) -> int:
    """Bytes at the peak: on a GPU of tensors since the last call, on a CPU of the process since its start."""
    if device.type == "cuda":
        peak = peak_memory(device, config)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
