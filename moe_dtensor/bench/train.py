"""``bench train``: whole training steps of a config, timed."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.bench.measure import Breakdown, measure_breakdown, provenance
from moe_dtensor.bench.torchtitan_model import Peer, check_peer, differences, prepared
from moe_dtensor.config.command_line import read_world_size, write_json
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Corpus, Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.estimate.shards import flops_per_token, parameters
from moe_dtensor.parallel.graphed import peak_memory
from moe_dtensor.train.build import build
from moe_dtensor.train.metrics import peak_flops
from moe_dtensor.train.ranks import end_ranks, start_ranks
from moe_dtensor.train.step import read_batch, train_step


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


@dataclass(frozen=True)
class PeerResult:
    """Another project's model of the same sizes on the same batches."""

    name: str
    version: str
    microbatch_size: int
    """Sequences in a forward on one rank."""
    differences: list[str]
    """What it computes otherwise."""
    result: TrainResult | None
    """MFU by the config's own FLOPs. None: it did not fit."""
    failure: str = ""


@dataclass(frozen=True)
class Options:
    """How ``bench train`` measures."""

    warmup: int
    """Steps before the clock starts, at least 1."""
    steps: int
    """Steps measured."""
    breakdown: bool
    """Also record where the time goes, on GPUs."""
    json: Path | None
    """File for results, configs and provenance."""
    peers: tuple[str, ...] = ()
    """Other projects' models of the same sizes, trained after each variant: names of
    :class:`moe_dtensor.bench.torchtitan_model.Peer`."""
    peer_microbatch: int = 0
    """Sequences in a peer's forward. 0: the config's, halved until a step fits."""


def bench_train(variants: dict[str, Config], options: Options) -> int:
    """Measure each variant in turn on the same ranks; rank 0 prints and writes JSON.

    Args:
        variants: resolved configs by name; a single one may have the name "".
        options: how.
    """
    configs = list(variants.values())
    for name in options.peers:
        for config in configs:
            check_peer(name, config, read_world_size(1))
    device = start_ranks(configs[0])
    corpus = build_corpus(configs[0])
    records = []
    for name, config in variants.items():
        config = set_vocabulary(config, corpus)
        result, ranks = _measure(config, corpus, device, options)
        if dist.get_rank() == 0:
            print(f"{name + ': ' if name else ''}{_line(config, result, options, ranks)}", flush=True)
            record: dict[str, Any] = {"ranks": dist.get_world_size(), "result": asdict(result)}
            record |= {"breakdown": [asdict(rank) for rank in ranks]} if ranks else {}
            records.append({"name": name} | record | {"config": asdict(config)})
            _write(records, options.json)
        _forget(device)
        for peer in options.peers:
            with prepared(device):
                answer = _measure_peer(peer, config, corpus, device, options)
            _forget(device)
            if dist.get_rank() == 0:
                print(f"{name + ': ' if name else ''}{_peer_line(answer)}", flush=True)
                records[-1].setdefault("peers", []).append(asdict(answer))
                _write(records, options.json)
    end_ranks()
    return 0


def _write(records: list[dict[str, Any]], path: Path | None) -> None:
    """After each variant, so that none is lost with a later one."""
    if path is None:
        return
    content = {"variants": records} if records[0]["name"] else {k: v for k, v in records[0].items() if k != "name"}
    write_json(path, provenance() | content)


def _measure(
    config: Config, corpus: Corpus, device: torch.device, options: Options
) -> tuple[TrainResult, list[Breakdown]]:
    trainer, loader = build(config, device), Loader(config, corpus)

    def step() -> Tensor:
        return train_step(trainer, read_batch(trainer, loader)).loss

    result = _run(step, config, device, options)
    breakdown = measure_breakdown(step) if options.breakdown and device.type == "cuda" else []
    trainer.runner.close()
    return result, breakdown


def _run(step: Callable[[], Tensor], config: Config, device: torch.device, options: Options) -> TrainResult:
    first = _seconds(step)
    for _ in range(options.warmup - 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, loss = _time(step, options.steps, device)
    return _result(config, times, first, loss, device)


def _measure_peer(name: str, config: Config, corpus: Corpus, device: torch.device, options: Options) -> PeerResult:
    """With the config's microbatch if a step of it fits, else with the largest half of it that does."""
    most = config.training.global_batch_size // dist.get_world_size()
    size = math.gcd(options.peer_microbatch or config.training.microbatch_size, most)
    unlike = differences(config, device)
    while True:
        try:
            # Held by no name here: what did not fit is freed with the traceback.
            result = _run(Peer(name, config, corpus, device, size).step, config, device, options)
            return PeerResult(name, version("torchtitan"), size, unlike, result)
        except torch.OutOfMemoryError as error:
            failure = str(error).split(". ")[0]
        if size == 1 or options.peer_microbatch or dist.get_world_size() > 1:
            return PeerResult(name, version("torchtitan"), size, unlike, None, failure)
        size //= 2
        _forget(device)


def _forget(device: torch.device) -> None:
    """Give back a variant's compiled blocks and memory: the next one's are others."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(config: Config, result: TrainResult, options: Options, ranks: list[Breakdown]) -> str:
    total, active = parameters(config)
    mfu = f", MFU {result.mfu:.1%}" if result.mfu else ""
    memory = f", {result.peak_memory_gib:.1f} GiB" if result.peak_memory_gib else ""
    line = (
        f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active: {result.step_seconds:.4f} s a step, "
        f"{result.tokens_per_second:,.0f} tokens/s{mfu}{memory}; first step {result.first_step_seconds:.1f} s, "
        f"loss {result.loss:.4f} after {options.warmup + options.steps} steps"
    )
    for i, rank in enumerate(ranks):
        parts = [f"{kind} {ms:.0f} ({rank.exposed_collectives[kind]:.0f})" for kind, ms in rank.collectives.items()]
        line += (
            f"\n  rank {i}: step {rank.step:.0f} ms, computing {rank.computing:.0f}, idle {rank.idle:.0f}, "
            f"exposed {rank.exposed:.0f}; collectives (exposed): {', '.join(parts) or 'none'}"
        )
    return line


def _peer_line(peer: PeerResult) -> str:
    head = f"{peer.name} ({peer.version}), {peer.microbatch_size} sequences in a forward"
    if peer.result is None:
        return f"{head}: {peer.failure}"
    result = peer.result
    mfu = f", MFU {result.mfu:.1%}" if result.mfu else ""
    memory = f", {result.peak_memory_gib:.1f} GiB" if result.peak_memory_gib else ""
    unlike = f"; it {', '.join(peer.differences)}" if peer.differences else ""
    return (
        f"{head}: {result.step_seconds:.4f} s a step, {result.tokens_per_second:,.0f} tokens/s{mfu}{memory}; first "
        f"step {result.first_step_seconds:.1f} s, loss {result.loss:.4f}{unlike}"
    )


def _seconds(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    step().item()
    return time.perf_counter() - start


def _time(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[list[float], Tensor]:
    """Seconds of each step, and the last loss. On a GPU by events: the host runs ahead, as it does in training."""
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


def _result(config: Config, times: list[float], first: float, loss: Tensor, device: torch.device) -> TrainResult:
    seconds = statistics.median(times)
    tokens_per_second = config.training.global_batch_size * config.training.seq_len / seconds
    peak = peak_flops(device)
    memory = None
    if device.type == "cuda":
        most = torch.tensor(peak_memory(device, config), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        memory = most.item() / 2**30
    return TrainResult(
        step_seconds=seconds,
        step_seconds_spread=(min(times), max(times)),
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops_per_token(config) / (peak * dist.get_world_size()) if peak else None,
        peak_memory_gib=memory,
        first_step_seconds=first,
        loss=loss.item(),
    )
