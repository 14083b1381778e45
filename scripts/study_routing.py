"""The study of docs/study.md: what routers learn and how they balance, and what expert placements send.

    python scripts/study_routing.py [--steps 200] [--seeds 3] [--jobs 2] [--runs outputs/study] [--out docs/study]

Trains a small model on the debug corpus once per routing setting and seed, each run on one rank and one core, then
measures its held-out loss both as evaluation routes and as training routes. Runs live in ``--runs``; finished ones are
kept and unfinished ones resume, so the script may be stopped at any time. ``--table.key value`` goes to every run.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import split_overrides
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.layers.record import unpack
from moe_dtensor.layers.router import Routing
from moe_dtensor.model.counts import parameters
from moe_dtensor.parallel.bytes_sent import BytesSent
from moe_dtensor.parallel.ranks import run_on_ranks
from moe_dtensor.parallel.traffic import traffic
from moe_dtensor.train.build import Trainer, build, set_vocabulary
from moe_dtensor.train.loop import end_ranks, start_ranks
from moe_dtensor.train.step import count_targets, read_batch, train_step
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
PLACEMENTS = (
    ("tp", "all_gather"),
    ("tp", "all_to_all"),
    ("tp_hidden", "all_gather"),
    ("dp", "all_gather"),
    ("dp", "all_to_all"),
    ("dp_tp", "all_gather"),
    ("dp_tp", "all_to_all"),
)
"""``mesh.experts`` and ``mesh.dispatch``."""
MEASURED = "held_out.json"
"""What the measurement leaves in a run's folder; with it a run is finished."""


@dataclass(frozen=True)
class Setting:
    """One way to route."""

    key: str
    family: str
    short: str
    """Its name within the family's panel."""
    label: str
    """Its name anywhere else."""
    changes: dict[str, str] = field(default_factory=dict)
    """Of the config, by key."""


def _topk(key: str, family: str, short: str, label: str, **moe: str) -> Setting:
    return Setting(key, family, short, label, {"moe.router": "topk"} | {f"moe.{name}": v for name, v in moe.items()})


FAMILIES = {
    "loss": "auxiliary loss",
    "bias": "bias on the choice",
    "group": "balanced assignment",
    "forced": "no choice",
    "capacity": "capacity",
}
SETTINGS = (
    _topk("topk", "none", "top-k", "top-k, nothing else"),
    Setting("dense", "none", "dense", "dense, K experts wide", {"moe.num_experts": "0", "model.hidden_dim": "256"}),
    _topk("balance_sequence", "loss", "sequence", "loss, sequence", balance_loss="0.01", balance_over="sequence"),
    _topk("balance_group", "loss", "group", "loss, group", balance_loss="0.01", balance_over="group"),
    _topk("balance_batch", "loss", "batch", "loss, batch", balance_loss="0.01", balance_over="batch"),
    _topk("balance_z", "loss", "group + z", "loss, group + z-loss", balance_loss="0.01", z_loss="0.001"),
    _topk("bias_slow", "bias", "rate 0.001", "bias, rate 0.001", bias_rate="0.001"),
    _topk("bias", "bias", "rate 0.01", "bias, rate 0.01", bias_rate="0.01"),
    _topk(
        "sigmoid_bias",
        "bias",
        "sigmoid, 0.01",
        "sigmoid, bias, rate 0.01",
        score="sigmoid",
        normalize_gates="true",
        bias_rate="0.01",
    ),
    Setting("sinkhorn", "group", "Sinkhorn", "Sinkhorn", {"moe.router": "sinkhorn"}),
    Setting("expert_choice", "group", "expert choice", "expert choice", {"moe.router": "expert_choice"}),
    Setting("hash", "forced", "hash", "hash of the byte", {"moe.router": "hash"}),
    Setting("uniform", "forced", "by chance", "by chance", {"moe.router": "uniform"}),
    _topk("capacity", "capacity", "1.25", "capacity 1.25", capacity_factor="1.25"),
    _topk(
        "capacity_balance",
        "capacity",
        "1.25 + loss",
        "capacity 1.25 + loss, group",
        capacity_factor="1.25",
        balance_loss="0.01",
    ),
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


# Plots


INK = "#6e7781"
"""Of text and axes: as readable on white as on black."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0629a")
"""After Okabe and Ito: told apart by colour-blind eyes, and on white and black alike."""
PANELS = {
    "load_max_over_mean": "busiest expert\n/ mean load",
    "experts_without_tokens": "experts without\ntokens, of 24",
    "load_churn": "churn: share of\ncopies that moved",
    "router_entropy": "router's entropy,\nnats",
}
"""Curves of the balance figure, with their axis labels."""


DASHES = (0, (4, 2))
DIRECTIONS = (
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"),
    (0.8, -0.8, "left", "top"),
    (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
)
"""Of a name from its point, and how it is aligned there."""
Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and values by seed."""
Line = tuple[float | None, str, str]
"""Where a curve ends, its colour and name."""


class Runs:
    """Curves and measurements by setting, all seeds together."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in record["runs"]:
            self.runs.setdefault(run["setting"], []).append(run)
        self.settings = [s for s in SETTINGS if s.key in self.runs]

    def family(self, name: str) -> list[Setting]:
        """Settings of one panel, in order."""
        return [s for s in self.settings if s.family == name]

    def curve(self, key: str, name: str) -> Curve | None:
        """Steps, and values by seed; None for what the setting does not have."""
        curves = [run["curves"].get(name) for run in self.runs.get(key, [])]
        if not curves or not all(curves):
            return None
        return np.array(curves[0][0]), np.array([values for _, values in curves])

    def held_out(self, key: str, routed: str, name: str) -> np.ndarray:
        """One number of the measurement after training, by seed."""
        return np.array([run["held_out"][routed][name] for run in self.runs[key]])


def draw_all(routers: dict[str, Any] | None, sent: dict[str, Any] | None, out: Path) -> None:
    """Every plot that the data at hand allows, as SVG."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.5,
            "svg.hashsalt": "study",
            "savefig.transparent": True,
        }
    )
    if routers and routers["runs"]:
        runs = Runs(routers)
        save(draw_loss(runs), out / "loss.svg")
        save(draw_balance(runs), out / "balance.svg")
        save(draw_held_out(runs), out / "held_out.svg")
        save(draw_scatter(runs), out / "loss_and_load.svg")
    if sent:
        save(draw_bytes(sent), out / "bytes.svg")


def save(figure: Any, path: Path) -> None:
    """Without a date, so that the same data make the same file; in tenths of a point, which halves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")

    def shorten(outline: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), outline[0])

    short = re.sub(r' d="[^"]*"', shorten, text.getvalue())
    path.write_text("\n".join(line.rstrip() for line in short.splitlines()) + "\n", encoding="utf-8")


def draw_loss(runs: Runs) -> Any:
    """Training loss, and held-out loss above that of plain top-k; a column for each family."""
    import matplotlib.pyplot as plt

    families = [name for name in FAMILIES if runs.family(name)]
    figure, axes = plt.subplots(
        2, len(families), figsize=(2.3 * len(families), 4.6), sharex=True, sharey="row", squeeze=False
    )
    labels = []
    for column, name in enumerate(families):
        top, bottom = axes[:, column]
        lines: list[Line] = [(0.0, INK, "top-k")]
        for setting, color in zip(runs.family(name), COLORS, strict=False):
            draw_curve(top, runs.curve(setting.key, "loss"), color)
            above = difference(runs.curve(setting.key, "validation_loss"), runs.curve("topk", "validation_loss"))
            lines.append((draw_curve(bottom, above, color), color, setting.short))
        draw_curve(top, runs.curve("topk", "loss"), INK, dashed=True)
        bottom.axhline(0, color=INK, linewidth=1, linestyle=DASHES)
        labels.append((bottom, lines))
        top.set_title(FAMILIES[name], color=INK, fontweight="bold", loc="left")
        bottom.set_xlabel("step")
    axes[0, 0].set_ylim(top=3.3)  # the first steps start above 5
    axes[0, 0].set_ylabel("training loss,\nnats a byte")
    axes[1, 0].set_ylabel("held-out loss above\nthat of top-k, nats a byte")
    finish(axes, labels)
    return figure


def draw_balance(runs: Runs) -> Any:
    """What the routers tell of themselves: a row for each metric, a column for each family."""
    import matplotlib.pyplot as plt

    families = [name for name in FAMILIES if runs.family(name)]
    figure, axes = plt.subplots(
        len(PANELS),
        len(families),
        figsize=(2.3 * len(families), 1.55 * len(PANELS)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    labels = []
    for column, name in enumerate(families):
        for row, metric in enumerate(PANELS):
            axis = axes[row, column]
            plain = draw_curve(axis, runs.curve("topk", metric), INK, dashed=True, smooth=2)
            lines: list[Line] = [
                (draw_curve(axis, runs.curve(setting.key, metric), color, smooth=2), color, setting.short)
                for setting, color in zip(runs.family(name), COLORS, strict=False)
            ]
            if row == 0:
                labels.append((axis, [*lines, (plain, INK, "top-k")]))
        axes[0, column].set_title(FAMILIES[name], color=INK, fontweight="bold", loc="left")
        axes[-1, column].set_xlabel("step")
    for row, label in enumerate(PANELS.values()):
        axes[row, 0].set_ylabel(label)
    finish(axes, labels)
    return figure


def draw_held_out(runs: Runs) -> Any:
    """Held-out loss after training, routed as evaluation and as training routes; settings sorted by the former."""
    import matplotlib.pyplot as plt

    order = sorted(runs.settings, key=lambda s: -runs.held_out(s.key, "evaluation", "loss").mean())
    figure, axis = plt.subplots(figsize=(7.5, 0.32 * len(order) + 0.9))
    for y, setting in enumerate(order):
        evaluated, trained = (runs.held_out(setting.key, routed, "loss") for routed in ("evaluation", "training"))
        axis.plot([evaluated.mean(), trained.mean()], [y, y], color=INK, linewidth=1, alpha=0.6)
        axis.scatter(trained, [y] * len(trained), s=9, color=COLORS[1], alpha=0.6, linewidths=0)
        axis.scatter(evaluated, [y] * len(evaluated), s=9, color=COLORS[0], alpha=0.6, linewidths=0)
        axis.scatter(trained.mean(), y, s=46, facecolors="none", edgecolors=COLORS[1], linewidths=1.6, zorder=3)
        axis.scatter(evaluated.mean(), y, s=30, color=COLORS[0], zorder=4)
    axis.set_yticks(range(len(order)), labels=[setting.label for setting in order])
    axis.set_xlabel("held-out loss after training, nats a byte")
    axis.text(1, 1.02, "as training routes (○)", transform=axis.transAxes, color=COLORS[1], ha="right")
    axis.text(0, 1.02, "as evaluation routes (●)", transform=axis.transAxes, color=COLORS[0])
    axis.grid(axis="both")
    axis.set_axisbelow(True)
    return figure


def draw_scatter(runs: Runs) -> Any:
    """Held-out loss over load, both as evaluation routes; a small dot is a seed."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    colors = dict(zip(FAMILIES, (*COLORS, INK), strict=True))
    points = []
    for setting in runs.settings:
        if setting.key == "dense":
            continue
        x, y = (runs.held_out(setting.key, "evaluation", name) for name in ("load_max_over_mean", "loss"))
        color = colors.get(setting.family, INK)
        axis.scatter(x, y, s=9, color=color, alpha=0.5, linewidths=0)
        axis.scatter(x.mean(), y.mean(), s=36, color=color, zorder=3)
        points.append((x.mean(), y.mean(), color, setting.label))
    axis.set_xlabel("busiest expert / mean load on held-out text, mean of the blocks")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.margins(x=0.17, y=0.06)
    axis.grid()
    axis.set_axisbelow(True)
    label_points(axis, points)
    return figure


def draw_bytes(sent: dict[str, Any]) -> Any:
    """Bytes that a rank sends in a step, by axis; ticks where ``plan`` reckons the sum."""
    import matplotlib.pyplot as plt

    entries = sent["placements"]
    axes_seen = [axis for axis in ("dp", "tp", "dp_tp", "world") if any(by_axis(e, axis) > 1e4 for e in entries)]
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(entries) + 0.9))
    for y, entry in enumerate(reversed(entries)):
        left = 0.0
        for name, color in zip(axes_seen, COLORS, strict=False):
            width = by_axis(entry, name) / 1e6
            axis.barh(y, width, left=left, height=0.62, color=color)
            if width > 1.5:
                axis.text(left + width / 2, y, f"{width:.1f}", color="white", ha="center", va="center", fontsize=8)
            left += width
        planned = sum(entry["planned"].values()) / 1e6
        axis.plot([planned, planned], [y - 0.42, y + 0.42], color=INK, linewidth=2)
        axis.text(max(left, planned) + 0.6, y, f"{left:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(entries)), labels=[f"{e['experts']}, {e['dispatch']}" for e in reversed(entries)])
    axis.set_xlabel("MB that a rank sends in a step (mean of the ranks); tick: reckoned by plan")
    for i, (name, color) in enumerate(zip(axes_seen, COLORS, strict=False)):
        axis.text(0.08 + 0.07 * i, 1.02, name, transform=axis.transAxes, color=color, fontweight="bold")
    axis.text(0, 1.02, "over", transform=axis.transAxes)
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    return figure


def by_axis(entry: dict[str, Any], axis: str) -> float:
    """Measured bytes of one placement over one axis."""
    return sum(count for key, count in entry["measured"].items() if key.split("/")[0] == axis)


def difference(curve: Curve | None, reference: Curve | None) -> Curve | None:
    """Seed by seed: both saw the same batches."""
    if curve is None or reference is None:
        return None
    seeds = min(len(curve[1]), len(reference[1]))
    return curve[0], curve[1][:seeds] - reference[1][:seeds]


def draw_curve(axis: Any, curve: Curve | None, color: str, dashed: bool = False, smooth: int = 1) -> float | None:
    """The mean of the seeds, and the band from the lowest to the highest; the last value.

    Args:
        smooth: points that are averaged into one.
    """
    if curve is None:
        return None
    starts = np.arange(0, len(curve[0]), smooth)
    steps, values = curve[0][np.minimum(starts + smooth, len(curve[0])) - 1], np.add.reduceat(curve[1], starts, axis=1)
    values = values / np.diff([*starts, len(curve[0])])
    axis.plot(steps, values.mean(0), color=color, linewidth=1.4, linestyle=DASHES if dashed else "-")
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    return float(values.mean(0)[-1])


def finish(axes: Any, labels: list[tuple[Any, list[Line]]]) -> None:
    """Grids below the lines, room between panels, and there the lines' names: only now are the scales known."""
    figure = axes.flat[0].figure
    for axis in axes.flat:
        axis.grid()
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
    figure.subplots_adjust(wspace=0.8, hspace=0.16)
    figure.canvas.draw()
    for axis, lines in labels:
        frame, known = axis.get_window_extent(), sorted(line for line in lines if line[0] is not None)
        heights = [(axis.transData.transform((0, value))[1] - frame.y0) / frame.height for value, _, _ in known]
        places = spread(heights, gap=11 * figure.dpi / 72 / frame.height)
        for place, (_, color, text) in zip(places, known, strict=True):
            axis.text(1.03, place, text, transform=axis.transAxes, color=color, fontsize=8, va="center")


def spread(places: list[float], gap: float) -> list[float]:
    """Sorted places, moved as little as needs be to stand ``gap`` apart and not below 0."""
    groups: list[tuple[float, int]] = []  # mean, members

    def floor(mean: float, count: int) -> tuple[float, int]:
        return max(mean, gap * (count - 1) / 2), count

    for place in places:
        groups.append(floor(place, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (mean, count), (below, fewer) = groups.pop(), groups.pop()
            groups.append(floor((mean * count + below * fewer) / (count + fewer), count + fewer))
    return [mean + gap * (i - (count - 1) / 2) for mean, count in groups for i in range(count)]


def label_points(axis: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside points, as near as no point and no other name is in the way; with a line where that is not near."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axis.figure.canvas.draw()
    renderer, frame = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform([p[:2] for p in points])]
    for x, y, color, text in points:
        for distance, (right, up, across, along) in product((7, 20, 34, 50), DIRECTIONS):
            label = axis.annotate(
                text,
                (x, y),
                (right * distance, up * distance),
                textcoords="offset points",
                color=color,
                fontsize=8,
                ha=across,
                va=along,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3}
                if distance > 7
                else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # of the words alone, without the line
            inside = frame.containsx(box.x0) and frame.containsx(box.x1) and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def table(routers: dict[str, Any]) -> list[str]:
    """Markdown: a line for each setting, lowest held-out loss first; of several seeds the mean, of losses the range."""
    runs = Runs(routers)
    lines = [
        "| routing | held-out loss (lowest to highest seed) | routed as in training | above top-k "
        "| busiest / mean | in training | cv | in training | without tokens | differs from top-k | dropped |",
        "|---|" + "---|" * 10,
    ]
    for setting in sorted(runs.settings, key=lambda s: runs.held_out(s.key, "evaluation", "loss").mean()):
        both = ("evaluation", "training")
        evaluated, trained = (runs.held_out(setting.key, routed, "loss") for routed in both)
        plain = runs.held_out("topk", "evaluation", "loss") if "topk" in runs.runs else evaluated
        seeds = min(len(evaluated), len(plain))
        above = (evaluated[:seeds] - plain[:seeds]).mean()
        spread_text = f" ({evaluated.min():.3f} to {evaluated.max():.3f})" if len(evaluated) > 1 else ""
        cells = [setting.label, f"{evaluated.mean():.3f}{spread_text}", f"{trained.mean():.3f}", f"{above:+.3f}"]
        if setting.key == "dense":
            cells += ["–"] * 7
        else:
            for name in ("load_max_over_mean", "load_cv"):
                cells += [f"{runs.held_out(setting.key, routed, name).mean():.2f}" for routed in both]
            cells.append(f"{runs.held_out(setting.key, 'evaluation', 'experts_without_tokens').mean():.1f}")
            for name in ("differs_from_top_k", "dropped"):
                share = runs.held_out(setting.key, "training", name).mean()
                cells.append(f"{share:.1%}" if share else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str]) -> int:
    """Train, measure, draw; 1 if a run failed."""
    own, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
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
