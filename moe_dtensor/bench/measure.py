"""Time and memory of a step, where its time goes on the GPUs, and what a measured number rests on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType

STEPS = 6
"""Steps that are issued together."""
Span = tuple[float, float]
"""Start and end, microseconds."""
RECORDED = 2
"""Steps whose breakdown is recorded."""
NAME = 120
"""Characters of a kernel's name that are kept."""
NCCL = {
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllReduce": "all_reduce",
    "SendRecv": "send_receive",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
}
"""Part of an NCCL kernel's name, and what is reported. An all-to-all is a send_receive, and so is a pipeline's."""


def measure_memory(forward: Callable[[], Tensor], dy: Tensor, parameters: set[int]) -> tuple[float, float]:
    """MiB that autograd keeps (parameters' storages aside), and the peak above what is there now (0 on a CPU)."""
    kept: dict[int, int] = {}

    @torch.compiler.disable  # it sees tensors of every shape
    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    if dy.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if dy.is_cuda else 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = forward()
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before if dy.is_cuda else 0
    return sum(kept.values()) / 2**20, peak / 2**20


def peak_mib(step: Callable[[], None]) -> float:
    """The same peak for a peer, whose gradients of an earlier step are dropped by the step itself."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wait(x: Tensor) -> None:
    """Until the device of ``x`` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize()


def several(run: Callable[[], None], cuda: bool) -> list[float]:
    """Milliseconds of some steps, issued without waiting in between, as a training loop does."""
    if not cuda:
        marks = [time.perf_counter()]
        for _ in range(STEPS):
            run()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


@dataclass(frozen=True)
class Breakdown:
    """One rank's step, milliseconds: ``computing``, ``exposed`` and ``idle`` add up to ``step``."""

    step: float
    computing: float
    """Some kernel other than a collective runs."""
    exposed: float
    """Only collectives run. One that waits for another rank runs: a pipeline's bubble is in here."""
    idle: float
    """Nothing runs."""
    collectives: dict[str, float]
    """All of their time, by kind."""
    exposed_collectives: dict[str, float]
    """Their time while nothing else computes, by kind."""
    kernels: dict[str, float]
    """All of the time of each kernel, copy and fill, by name, longest first."""


def measure_breakdown(step: Callable[[], object]) -> list[Breakdown]:
    """Record some steps on every rank; the breakdown of each, in rank order. All ranks call it together, on GPUs."""
    torch.cuda.synchronize()
    dist.barrier()
    everyone: list[Breakdown | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, break_down(record_kernels(step, RECORDED), RECORDED))
    return [each for each in everyone if each is not None]


def record_kernels(step: Callable[[], object], steps: int) -> list[tuple[str, Span]]:
    """Name and span of everything that runs on this process's GPU in some steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]


def break_down(kernels: Iterable[tuple[str, Span]], steps: int) -> Breakdown:
    """The breakdown of a step, of ``steps`` recorded ones.

    Args:
        kernels: name and span of everything that ran on one GPU.
        steps: recorded from the first span's start to the last one's end.
    """
    by_kind: dict[str, list[Span]] = {}
    by_name: dict[str, list[Span]] = {}
    computing: list[Span] = []
    for name, span in kernels:
        by_name.setdefault(name[:NAME], []).append(span)
        kind = kind_of(name)
        (computing if kind is None else by_kind.setdefault(kind, [])).append(span)
    busy = union(computing)
    moving = union(span for spans in by_kind.values() for span in spans)
    both = union([*busy, *moving])

    def milliseconds(spans: Iterable[Span]) -> float:
        return sum(end - start for start, end in spans) / 1e3 / steps

    kinds = {kind: union(spans) for kind, spans in sorted(by_kind.items())}
    whole = milliseconds([(both[0][0], both[-1][1])]) if both else 0.0
    computed, active = milliseconds(busy), milliseconds(both)
    names = sorted(((name, milliseconds(spans)) for name, spans in by_name.items()), key=lambda item: -item[1])
    return Breakdown(
        step=whole,
        computing=computed,
        exposed=active - computed,
        idle=whole - active,
        collectives={kind: milliseconds(spans) for kind, spans in kinds.items()},
        exposed_collectives={kind: milliseconds(union([*busy, *spans])) - computed for kind, spans in kinds.items()},
        kernels={name: round(time, 4) for name, time in names},
    )


def kind_of(kernel: str) -> str | None:
    """What collective a kernel is; None for one that computes."""
    if "nccl" not in kernel.lower():
        return None
    return next((kind for part, kind in NCCL.items() if part in kernel), "other_collective")


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def provenance() -> dict[str, Any]:
    """Date, commit, device and versions, to stand beside results in a JSON file.

    The commit is ``MOE_DTENSOR_COMMIT`` where a copy without git is run, else git's; None if neither is known.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("MOE_DTENSOR_COMMIT") or (found if len(found) == 40 else None),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton", "torchtitan", "transformers")}
        | {name: _version(name) for name in ("quack-kernels", "flash-attn-4") if _version(name)}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
