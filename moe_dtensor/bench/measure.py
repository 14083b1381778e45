"""Time and memory of a step, for ``bench``, and what a measured number rests on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.bench.shapes import Layer
from moe_dtensor.kernels.experts.activation import num_up_projections

STEPS = 6
"""Steps that are issued together."""


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


def graph_milliseconds(layer: Layer, backend: str) -> float:
    """Milliseconds of a step captured in a CUDA graph and replayed."""
    leaves = list(layer.leaves.values())

    def step() -> None:
        torch.autograd.grad(layer(backend), leaves, layer.dy_TD)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return statistics.median(several(graph.replay, True) + several(graph.replay, True))


def dense_products(layer: Layer) -> Callable[[], None]:
    """Run the matrix products of a layer's experts and their gradients with one weight for all rows: what a card does
    with the same FLOPs where nothing is routed."""
    shape = layer.shape
    rows, up = shape.tokens * shape.top_k, num_up_projections(shape.activation) * shape.hidden
    sizes = [(rows, shape.dim, up), (rows, shape.hidden, shape.dim)]
    operands = [
        tuple(torch.randn(size, device=layer.x_TD.device, dtype=layer.x_TD.dtype) for size in ((n, d), (f, d), (n, f)))
        for n, d, f in sizes
    ]

    def run() -> None:
        for x, w, dy in operands:
            x @ w.T
            dy @ w
            dy.T @ x

    return run


def kernel_times(run: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step by kernel name, longest first."""
    steps = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.events():
        times[event.name[:80]] = times.get(event.name[:80], 0.0) + event.device_time / 1e3 / steps
    return dict(sorted(((name, round(t, 4)) for name, t in times.items() if t > 0), key=lambda item: -item[1]))


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
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
