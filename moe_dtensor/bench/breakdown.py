"""Where a training step's time goes on the GPUs: computing, each collective, and what of it nothing hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

Span = tuple[float, float]
"""Start and end, microseconds."""

STEPS = 2
"""Steps that are recorded."""
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    everyone: list[Breakdown | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, break_down(kernels, STEPS))
    return [each for each in everyone if each is not None]


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
