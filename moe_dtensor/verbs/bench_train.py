"""``bench train``: whole training steps of a config, timed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.model.counts import flops_per_token, parameters
from moe_dtensor.train.build import build, set_vocabulary
from moe_dtensor.train.loop import end_ranks, start_ranks
from moe_dtensor.train.metrics import peak_flops
from moe_dtensor.train.step import StepResult, read_batch, train_step
from moe_dtensor.verbs.bench_provenance import provenance


@dataclass(frozen=True)
class TrainResult:
    """Medians over the measured steps; a step is a global batch with its optimizer update, data loading included."""

    step_seconds: float
    step_seconds_spread: tuple[float, float]
    tokens_per_second: float
    mfu: float | None
    """Of the dense bf16 peak of all GPUs; None on CPUs."""
    peak_memory_gib: float | None
    """Highest memory of tensors on a GPU, the largest of all ranks."""
    first_step_seconds: float
    """Compilation included."""
    loss: float
    """Of the last step: a number that is not finite would make the times worthless."""


def bench_train(config: Config, warmup: int, steps: int, json_path: Path | None) -> int:
    """Take ``warmup`` steps, then time ``steps`` more; rank 0 prints and writes JSON.

    Args:
        config: resolved.
        warmup: steps before the clock starts, at least 1.
        steps: steps measured.
        json_path: file for result, config and provenance.
    """
    device = start_ranks(config)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer, loader = build(config, device), Loader(config, corpus)

    def step() -> StepResult:
        return train_step(trainer, read_batch(trainer, loader))

    first = _seconds(step, device)
    for _ in range(warmup - 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, last = _time(step, steps, device)
    result = _result(config, times, first, last, device)
    if dist.get_rank() == 0:
        total, active = parameters(config)
        mfu = f", MFU {result.mfu:.1%}" if result.mfu else ""
        memory = f", {result.peak_memory_gib:.1f} GiB" if result.peak_memory_gib else ""
        print(
            f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active: {result.step_seconds:.4f} s a step, "
            f"{result.tokens_per_second:,.0f} tokens/s{mfu}{memory}; first step {result.first_step_seconds:.1f} s, "
            f"loss {result.loss:.4f} after {warmup + steps} steps",
            flush=True,
        )
        if json_path:
            record: dict[str, Any] = provenance() | {"ranks": dist.get_world_size()}
            record |= {"result": asdict(result), "config": asdict(config)}
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    end_ranks()
    return 0


def _seconds(step: Callable[[], StepResult], device: torch.device) -> float:
    start = time.perf_counter()
    step().loss.item()
    return time.perf_counter() - start


def _time(step: Callable[[], StepResult], steps: int, device: torch.device) -> tuple[list[float], StepResult]:
    """Seconds of each step. On a GPU by events, so that the host runs ahead as it does in training."""
    if device.type == "cpu":
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            last = step()
            times.append(time.perf_counter() - start)
        return times, last
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        last = step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], last


def _result(config: Config, times: list[float], first: float, last: StepResult, device: torch.device) -> TrainResult:
    seconds = statistics.median(times)
    tokens_per_second = config.training.global_batch_size * config.training.seq_len / seconds
    peak = peak_flops(device)
    memory = None
    if device.type == "cuda":
        most = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        memory = most.item() / 2**30
    return TrainResult(
        step_seconds=seconds,
        step_seconds_spread=(min(times), max(times)),
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops_per_token(config) / (peak * dist.get_world_size()) if peak else None,
        peak_memory_gib=memory,
        first_step_seconds=first,
        loss=last.loss.item(),
    )
