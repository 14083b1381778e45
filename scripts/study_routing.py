"""The study of docs/study.md: what routers learn and how they balance, and what expert placements send.

    python scripts/study_routing.py [--steps 200] [--seeds 3] [--jobs 2] [--runs outputs/study] [--out docs/study]

Trains a small model on the debug corpus once per routing setting and seed, each run on one rank and one core, then
measures its held-out loss both as evaluation routes and as training routes. Runs live in ``--runs``; finished ones are
kept and unfinished ones resume, so the script may be stopped at any time. ``--table.key value`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.command_line import split_overrides
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.layers.record import unpack
from moe_dtensor.layers.router import Routing
from moe_dtensor.model.counts import parameters
from moe_dtensor.train.build import Trainer, build, set_vocabulary
from moe_dtensor.train.loop import end_ranks, start_ranks
from moe_dtensor.train.step import count_targets, read_batch
from moe_dtensor.verbs import train
from moe_dtensor.verbs.bench_provenance import provenance

CONFIG = "train_configs/debug.toml"
SMALL = {
    "model.num_layers": "3",
    "training.global_batch_size": "12",
    "training.validation_interval": "20",
    "training.validation_sequences": "48",
    "checkpoint.interval": "50",
    "mesh.dp": "1",
}
"""What the runs change of the debug config: half the blocks, smaller steps, validation."""
EVERY = 5
"""Steps that one point of a kept curve is the mean of."""
HELD_OUT_SEQUENCES = 240
"""Sequences of the measurement after training."""
MEASURED = "held_out.json"
"""What the measurement leaves in a run's folder; with it a run is finished."""


@dataclass(frozen=True)
class Setting:
    """One way to route."""

    key: str
    label: str
    family: str
    changes: dict[str, str] = field(default_factory=dict)


def _topk(key: str, label: str, family: str, **changes: str) -> Setting:
    return Setting(key, label, family, {"moe.router": "topk"} | {f"moe.{name}": v for name, v in changes.items()})


SETTINGS = (
    _topk("topk", "top-k, no balancing", "none"),
    _topk("balance_sequence", "loss over sequence", "loss", balance_loss="0.01", balance_over="sequence"),
    _topk("balance_group", "loss over group", "loss", balance_loss="0.01", balance_over="group"),
    _topk("balance_batch", "loss over batch", "loss", balance_loss="0.01", balance_over="batch"),
    _topk("balance_z", "loss over group + z-loss", "loss", balance_loss="0.01", z_loss="0.001"),
    _topk("bias_slow", "bias, rate 0.001", "bias", bias_rate="0.001"),
    _topk("bias", "bias, rate 0.01", "bias", bias_rate="0.01"),
    _topk(
        "sigmoid_bias",
        "sigmoid, gates to 1, bias 0.01",
        "bias",
        score="sigmoid",
        normalize_gates="true",
        bias_rate="0.01",
    ),
    Setting("sinkhorn", "Sinkhorn", "assignment", {"moe.router": "sinkhorn"}),
    Setting("expert_choice", "expert choice", "assignment", {"moe.router": "expert_choice"}),
    Setting("hash", "hash of the byte", "forced", {"moe.router": "hash"}),
    Setting("uniform", "by chance", "forced", {"moe.router": "uniform"}),
    _topk("capacity", "capacity 1.25", "capacity", capacity_factor="1.25"),
    _topk(
        "capacity_balance", "capacity 1.25 + loss over group", "capacity", capacity_factor="1.25", balance_loss="0.01"
    ),
    Setting("dense", "dense, as many active weights", "none", {"moe.num_experts": "0", "model.hidden_dim": "256"}),
)

OVER_BLOCKS: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "load_max_over_mean": ("expert_load_max_over_mean", fmean),
    "load_worst_block": ("expert_load_max_over_mean", max),
    "load_cv": ("expert_load_cv", fmean),
    "experts_without_tokens": ("experts_without_tokens", sum),
    "load_churn": ("expert_load_churn", fmean),
    "router_entropy": ("router_entropy", fmean),
    "differs_from_top_k": ("differs_from_top_k", fmean),
    "dropped": ("dropped", fmean),
}
"""Curves of the routers: the metric by block, and how blocks become one number."""


# Training


@dataclass(frozen=True, eq=False)
class Job:
    """One training run."""

    setting: Setting
    seed: int
    folder: Path
    overrides: dict[str, str]

    def arguments(self) -> list[str]:
        """Of ``python -m moe_dtensor train``."""
        return ["--config", CONFIG, *(f"--{key}={value}" for key, value in self.overrides.items())]

    def finished(self) -> bool:
        """Whether it was trained to its end and measured."""
        return (self.folder / MEASURED).is_file()

    def step(self) -> int:
        """Steps that its metrics tell of."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0


def build_jobs(options: argparse.Namespace, overrides: dict[str, str]) -> list[Job]:
    """All runs, those of the first seed first."""
    chosen = [s for s in SETTINGS if not options.settings or s.key in options.settings.split(",")]
    jobs = []
    for seed in range(options.seeds):
        for setting in chosen:
            folder = Path(options.runs) / f"{setting.key}-{options.steps}-seed{seed}"
            fixed = {"training.steps": options.steps, "training.seed": seed, "run.folder": folder}
            words = {key: str(value) for key, value in fixed.items()}
            jobs.append(Job(setting, seed, folder, {**SMALL, **setting.changes, **words, **overrides}))
    return jobs


def train_all(jobs: list[Job], at_once: int, steps: int) -> list[Job]:
    """Run what is not finished, ``at_once`` together; the jobs that failed."""
    waiting = [job for job in jobs if not job.finished()]
    say(f"{len(jobs)} runs of {steps} steps, {len(jobs) - len(waiting)} of them finished before")
    # Forked from here, runs need not load torch again.
    context = multiprocessing.get_context("fork")
    running: dict[Job, tuple[multiprocessing.process.BaseProcess, float]] = {}
    failed: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                process = context.Process(target=train_and_measure, args=(job,))
                process.start()
                running[job] = process, time.monotonic()
            time.sleep(1)
            for job, (process, since) in list(running.items()):
                if process.is_alive():
                    continue
                del running[job]
                if not job.finished():
                    failed.append(job)
                    say(f"failed: {job.folder.name}; see {log_file(job)}")
                    continue
                done = sum(other.finished() for other in jobs)
                say(f"[{done}/{len(jobs)}] {job.folder.name} in {time.monotonic() - since:.0f} s")
            if sys.stdout.isatty():
                live = "  ".join(f"{job.folder.name} {job.step()}/{steps}" for job in running)
                print(f"\r\x1b[K{live}", end="", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
    return failed


def train_and_measure(job: Job) -> None:
    """In a process of its own: what ``python -m moe_dtensor train`` does, then the held-out text."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file(job), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if train.main(job.arguments()) == 0:
        measured = measure(job)
        beside = job.folder / f".{MEASURED}.partial"
        beside.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        beside.replace(job.folder / MEASURED)


def measure(job: Job) -> dict[str, Any]:
    """The trained model on held-out text, the same in every run: routed as in evaluation, and as in training."""
    overrides = {**job.overrides, "training.validation_sequences": "0"}
    config = resolve(load(CONFIG, overrides), 1)
    device = start_ranks(config)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer, held_out = build(config, device), Loader(config, corpus, "validation")
    state = trainer.parts, trainer.optimizers, trainer.schedule, Loader(config, corpus), trainer.balance
    CheckpointManager(job.folder / config.checkpoint.folder, config, *state).load_latest()  # type: ignore[arg-type]
    batches = [read_batch(trainer, held_out) for _ in range(HELD_OUT_SEQUENCES // held_out.batch_size)]
    total, active = parameters(config)
    result: dict[str, Any] = {"parameters": total, "active_parameters": active, "provenance": provenance()}
    for routed, training in (("evaluation", False), ("training", True)):
        for part in trainer.parts:
            part.train(training)
        result[routed] = mean_over(trainer, batches)
    end_ranks()
    return result


@torch.no_grad()
def mean_over(trainer: Trainer, batches: list[Batch]) -> dict[str, float]:
    """Mean loss and the routers' load over all batches together; on one rank."""
    sums: dict[int, Tensor] = {}

    def add(layer: int, routing: Routing) -> None:
        # A model keeps no record of an evaluation, its routers give it.
        sums[layer] = sums.get(layer, 0) + routing.record_R

    routers = {i: trainer.parts[0].get_submodule(f"layers.{i}.moe.router") for i in trainer.parts[0].moe_layers}
    hooks = [
        router.register_forward_hook(lambda _module, _args, out, layer=i: add(layer, out))
        for i, router in routers.items()
    ]
    result = {"loss": fmean((trainer.runner.evaluate(b) / count_targets(trainer, b)).item() for b in batches)}
    for hook in hooks:
        hook.remove()
    if sums:
        tokens = sum(batch.tokens_BS.numel() for batch in batches)
        load_LE, means = unpack(torch.stack(list(sums.values())), tokens, trainer.config.moe.top_k)
        result["load_max_over_mean"] = (load_LE.amax(1) / load_LE.mean(1)).mean().item()
        result["load_cv"] = (load_LE.std(1, correction=0) / load_LE.mean(1)).mean().item()
        result["experts_without_tokens"] = (load_LE == 0).sum().item()
        result |= {name: means[name].mean().item() for name in ("dropped", "differs_from_top_k")}
    return result


def log_file(job: Job) -> Path:
    """Where a run's output goes."""
    return job.folder.with_suffix(".log")


def say(message: str) -> None:
    """One line; it takes the place of the live line."""
    print(f"\r\x1b[K{message}" if sys.stdout.isatty() else message, flush=True)


def main(argv: list[str]) -> int:
    """Train, measure, draw; 1 if a run failed."""
    own, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--settings", default="", help="only these, by key, with commas between")
    parser.add_argument("--runs", default="outputs/study", help="folder of the runs")
    parser.add_argument("--out", default="docs/study", help="folder of the JSON files and plots")
    options = parser.parse_args(own)
    jobs = build_jobs(options, overrides)
    failed = train_all(jobs, options.jobs, options.steps)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
