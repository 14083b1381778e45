"""The study of docs/study.md: what routers learn and how they balance, and what expert placements send.

    python scripts/study_routing.py [--steps 200] [--seeds 2] [--jobs 2] [--runs outputs/study] [--out docs/study]

Trains a small model on the debug corpus once per routing setting and seed, each run on one rank and one core, then
measures its held-out loss both as evaluation routes and as training routes. Runs live in ``--runs``; finished ones are
kept and unfinished ones resume, so the script may be stopped at any time. ``--table.key value`` goes to every run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from study_plots import draw_all, table
from study_settings import (
    CONFIG,
    EVERY,
    HELD_OUT_SEQUENCES,
    MEASURED,
    OVER_BLOCKS,
    PLACEMENTS,
    SETTINGS,
    SMALL,
    Setting,
)
from torch import Tensor

from moe_dtensor.bench.measure import provenance
from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import split_overrides
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.estimate.shards import parameters
from moe_dtensor.estimate.traffic import traffic
from moe_dtensor.layers.router import Routing, unpack_record
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.ranks import end_ranks, start_ranks
from moe_dtensor.train.step import count_targets, read_batch, train_step
from moe_dtensor.verbs import train


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
    running: dict[Job, tuple[multiprocessing.context.ForkProcess, float]] = {}
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
        load_LE, means = unpack_record(torch.stack(list(sums.values())), tokens, trainer.config.moe.top_k)
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


# Curves


def collect(jobs: list[Job]) -> dict[str, Any]:
    """Everything that finished runs tell, for ``routers.json``."""
    runs = [
        {"setting": job.setting.key, "seed": job.seed}
        | {"held_out": json.loads((job.folder / MEASURED).read_text(encoding="utf-8"))}
        | {"curves": read_curves(job.folder / "metrics.jsonl")}
        for job in jobs
        if job.finished()
    ]
    settings = {s.key: {"label": s.label, "changes": s.changes} for s in SETTINGS}
    return {"provenance": provenance(), "base": CONFIG, "small": SMALL, "settings": settings, "runs": runs}


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """Steps and values of each curve: means over :data:`EVERY` steps, of validation what was measured."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = {"loss": _windows(records, lambda record: record["loss"])}
    curves["validation_loss"] = _points([(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r])
    for name, (metric, over_blocks) in OVER_BLOCKS.items():
        if metric in records[0]:
            curves[name] = _windows(records, partial(_over_blocks, metric, over_blocks))
    return curves


def _over_blocks(metric: str, over: Callable[[list[float]], float], record: dict[str, Any]) -> float:
    return over(list(record[metric].values()))


def _windows(records: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> list[list[float]]:
    parts = [records[i : i + EVERY] for i in range(0, len(records), EVERY)]
    return _points([(part[-1]["step"], fmean(map(value, part))) for part in parts])


def _points(pairs: list[tuple[int, float]]) -> list[list[float]]:
    """``[steps, values]``, five digits."""
    return [[step for step, _ in pairs], [float(f"{value:.5g}") for _, value in pairs]]


def write_json(path: Path, record: dict[str, Any], lines: str) -> None:
    """One entry of the list ``record[lines]`` a line: small, and a diff shows what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = json.dumps({key: value for key, value in record.items() if key != lines}, indent=1)
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in record[lines])
    path.write_text(f'{rest[:-2]},\n "{lines}": [\n{entries}\n ]\n}}\n', encoding="utf-8")


# Bytes


def measure_all_bytes(mesh: tuple[int, int, int], overrides: dict[str, str]) -> dict[str, Any]:
    """Bytes of a real step of the debug config under each placement and dispatch, and those that ``plan`` reckons."""
    ranks = mesh[0] * mesh[1] * mesh[2]
    on_mesh = dict(zip(("mesh.dp", "mesh.pp", "mesh.tp"), map(str, mesh), strict=True))
    entries = []
    for experts, dispatch in PLACEMENTS:
        placed = {**on_mesh, "mesh.experts": experts, "mesh.dispatch": dispatch}
        config = resolve(load(CONFIG, {**placed, **overrides}), ranks)
        check(config, ranks)
        config = set_vocabulary(config, build_corpus(config))
        since = time.monotonic()
        by_rank = run_on_ranks(count_bytes, ranks, config, timeout=1800.0)
        keys = sorted({key for sent in by_rank for key in sent})
        entries.append(
            {
                "experts": experts,
                "dispatch": dispatch,
                "measured": {"/".join(key): fmean(sent.get(key, 0) for sent in by_rank) for key in keys},
                "measured_most": {"/".join(key): max(sent.get(key, 0) for sent in by_rank) for key in keys},
                "planned": asdict(traffic(config)),
            }
        )
        say(f"bytes of experts = {experts}, dispatch = {dispatch} in {time.monotonic() - since:.0f} s")
    return {"provenance": provenance(), "config": CONFIG, "overrides": overrides, "mesh": mesh, "placements": entries}


def count_bytes(config: Config) -> dict[tuple[str, str], int]:
    """On each rank: bytes of its second training step by axis and collective."""
    trainer, loader = build(config, torch.device("cpu")), Loader(config, build_corpus(config))
    train_step(trainer, read_batch(trainer, loader))
    batch = read_batch(trainer, loader)
    with BytesSent(trainer.mesh) as sent:
        train_step(trainer, batch)
    return sent.by_collective()


def main(argv: list[str]) -> int:
    """Train, measure, draw; 1 if a run failed."""
    own, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--settings", default="", help="only these, by key, with commas between")
    parser.add_argument("--part", choices=("all", "routers", "bytes", "plots"), default="all", help="do only this")
    parser.add_argument("--mesh", default="2x1x4", help="DPxPPxTP of the bytes, as CPU ranks")
    parser.add_argument("--runs", default="outputs/study", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/study"), help="folder of the JSON files and plots")
    options = parser.parse_args(own)
    routers_file, bytes_file = options.out / "routers.json", options.out / "bytes.json"
    failed: list[Job] = []
    if options.part in ("all", "routers"):
        jobs = build_jobs(options, overrides)
        failed = train_all(jobs, options.jobs, options.steps)
        write_json(routers_file, collect(jobs), "runs")
    if options.part == "bytes" or (options.part == "all" and not bytes_file.is_file()):
        dp, pp, tp = map(int, options.mesh.split("x"))
        write_json(bytes_file, measure_all_bytes((dp, pp, tp), overrides), "placements")
    if importlib.util.find_spec("matplotlib") is None:
        say("The plots need matplotlib: pip install -e '.[study]'")
        return 1
    routers, sent = (
        json.loads(f.read_text(encoding="utf-8")) if f.is_file() else None for f in (routers_file, bytes_file)
    )
    draw_all(routers, sent, options.out)
    if routers and routers["runs"]:
        print("\n".join(table(routers)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
