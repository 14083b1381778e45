"""``plan --search``: the best ways to run a config on so many devices, and why the others lose."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import tables
from moe_dtensor.estimate.dispatch import settle
from moe_dtensor.estimate.memory import Memory, settle_accumulate
from moe_dtensor.estimate.search import GIB, RESERVE, Candidate, Found, search
from moe_dtensor.estimate.speed import ROUTINGS, Routing, Speeds, step_time, tokens_per_second

RESULTS = Path(__file__).parents[2] / "docs" / "results"
DEVICES = ("H100", "H200")
"""Whose measurements the estimate is held against: both compute alike."""
ITEMS = {
    "weights": "master weights",
    "gradients": "gradients",
    "moments": "moments",
    "compute_copy": "compute copy",
    "expert_copy": "experts' compute copy",
    "activations": "activations",
    "buffers": "pipeline buffers",
    "at_loss": "logits",
    "at_block": "a block's backward",
    "at_reduce": "a block's reduction",
}
TERMS = {
    "computing": "computing",
    "uneven": "uneven experts",
    "weights": "weights and gradients sent",
    "tokens": "tokens sent",
    "stages": "between stages",
    "waiting": "collectives and reads",
    "updating": "the optimizer",
    "bubble": "bubble",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``--search``."""
    defaults = Speeds()
    group = parser.add_argument_group("search")
    group.add_argument("--search", action="store_true", help="find the best meshes, placements, schedules for --gpus N")
    group.add_argument("--gpus", type=int, metavar="N", help="devices")
    group.add_argument("--memory", type=float, metavar="GiB", help="of one device")
    group.add_argument("--host", type=int, default=defaults.host, metavar="N", help="devices in a host; default: 8")
    group.add_argument(
        "--inside", type=float, default=defaults.inside / 1e9, metavar="GB/s", help="in a host, a device; default: 450"
    )
    group.add_argument(
        "--between", type=float, default=defaults.between / 1e9, metavar="GB/s", help="between hosts; default: 50"
    )
    group.add_argument(
        "--tflops", type=float, default=defaults.flops / 1e12, help="TFLOP/s a device makes of products; default: 380"
    )
    group.add_argument("--routing", choices=ROUTINGS, default="learned", help="what to rank by; default: learned")
    group.add_argument("--top", type=int, default=8, metavar="N", help="ways to show; default: 8")


def run_search(config: Config, options: argparse.Namespace, console: Console) -> int:
    """Print the best and why the others lose; 1 if nothing fits."""
    for name in ("gpus", "memory"):
        if not getattr(options, name):
            raise ConfigError(f"plan --search needs --{name}.", "Write --search --gpus 8 --memory 80.")
    for name in ("gpus", "host", "top", "inside", "between", "tflops"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name} {getattr(options, name)} must be above 0.", "Leave it out for its default.")
    if options.memory <= RESERVE:
        raise ConfigError(f"--memory {options.memory:g} GiB: {RESERVE} GiB of it are set aside.", "Give a device's.")
    speeds = Speeds(options.tflops * 1e12, options.inside * 1e9, options.between * 1e9, options.host)
    routing: Routing = options.routing
    with console.status(f"trying meshes of {options.gpus} devices"):
        found = search(config, options.gpus, options.memory, speeds, routing)
    measured = list(measurements())
    _show(found, measured, routing, options, console)
    if options.json:
        write_json(options.json, _to_json(found, measured))
    return 0 if found.best else 1


def _show(found: Found, measured: list[dict[str, Any]], routing: Routing, options: Any, console: Console) -> None:
    title = f"{options.gpus} devices of {options.memory:g} GiB, by estimated tokens/s under {routing} routing"
    table = Table(title=f"{title}; {found.tried} tried", title_justify="left")
    for column in ("mesh", "what else", "GiB, skewed", *(f"{r}" for r in ROUTINGS), "loses"):
        table.add_column(column, justify="right" if column in ROUTINGS else "left")
    for candidate in found.best[: options.top]:
        table.add_row(
            candidate.mesh,
            what_else(candidate),
            f"{candidate.memory.peak / GIB:.1f}, {candidate.skewed_peak / GIB:.1f}",
            *(f"{candidate.speed(r):,.0f}" for r in ROUTINGS),
            why_slower(candidate, found.best[0], routing),
        )
    if found.best:
        console.print(table)
        best = found.best[0]
        console.print(f"memory of the best, GiB: {memory_items(best.memory)}", highlight=False)
        console.print(f"to run it: {flags(best)}", highlight=False)
    else:
        console.print(f"Nothing fits on {options.gpus} devices of {options.memory:g} GiB.")
    shown = {c.mesh for c in found.best[: options.top]}
    slower = {c.mesh: c for c in reversed(found.best) if c.mesh not in shown}
    for mesh, candidate in reversed(slower.items()):
        console.print(f"{mesh} loses: {why_slower(candidate, found.best[0], routing)}", highlight=False)
    for candidate in found.too_large:
        peak = candidate.memory.peak / GIB
        console.print(
            f"{candidate.mesh} does not fit: {peak:.1f} GiB at least: {memory_items(candidate.memory, 3)}",
            highlight=False,
        )
    for mesh, rule in found.refused.items():
        console.print(f"{mesh} cannot run: {rule}", highlight=False)
    for line in error_lines(measured):
        console.print(line, highlight=False)


def what_else(candidate: Candidate) -> str:
    """The choices beside the mesh, in words of the config."""
    config = candidate.config
    mesh, words = config.mesh, []
    if config.moe.num_experts:
        words.append(f"experts {mesh.experts}")
        if mesh.experts in ("dp", "dp_tp") and mesh.expert_ranks < mesh.dp:
            words.append(f"expert_ranks {mesh.expert_ranks} {mesh.expert_weights}")
        words.append(mesh.dispatch)
    words += ["attention by sequences"] if mesh.tp > 1 and mesh.attention == "sequences" else []
    words += [f"dp_replicate {mesh.dp_replicate}"] if mesh.dp_replicate > 1 else []
    words += [config.pipeline.schedule] if mesh.pp > 1 else []
    words += [f"microbatch {config.training.microbatch_size}", f"recompute {config.activation_checkpoint.mode}"]
    return ", ".join([*words, f"accumulate {config.fsdp.accumulate}"])


def flags(candidate: Candidate) -> str:
    """The command line that sets a candidate's choices."""
    settled = {"mesh.dispatch": candidate.config.mesh.dispatch, "fsdp.accumulate": candidate.config.fsdp.accumulate}
    return " ".join(f"--{key} {value}" for key, value in (candidate.keys | settled).items())


def memory_items(memory: Memory, most: int = 10) -> str:
    """The largest items of a rank's memory, of the three moments the one that counts."""
    moment = max(("at_loss", "at_block", "at_reduce"), key=lambda name: getattr(memory, name))
    sizes = {name: getattr(memory, name) for name in ITEMS if not name.startswith("at_") or name == moment}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:most]
    return ", ".join(f"{ITEMS[name]} {sizes[name] / GIB:.1f}" for name in largest if sizes[name] > 0.05 * GIB)


def why_slower(candidate: Candidate, best: Candidate, routing: Routing) -> str:
    """By how much, and the two largest terms that it is slower for."""
    if candidate is best:
        return ""
    mine, theirs = vars(candidate.time(routing)), vars(best.time(routing))
    share = candidate.time(routing).total / best.time(routing).total - 1
    more = sorted(((mine[name] - theirs[name], text) for name, text in TERMS.items()), reverse=True)[:2]
    terms = ", ".join(f"{text} {seconds:+.2f} s" for seconds, text in more if seconds > 0.005)
    return f"{share:.0%} longer: {terms}" if terms else f"{share:.0%} longer"


def measurements() -> Iterator[dict[str, Any]]:
    """Steps that ``bench train`` measured on GPUs, with what this estimate says of them."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not any(name in str(content.get("device")) for name in DEVICES):
            continue
        for record in content.get("variants") or [content]:
            if not {"result", "config", "ranks"} <= record.keys():
                continue
            config = config_of(record)
            if config.fsdp.cpu_offload:
                continue  # the estimate knows nothing of the way to host memory
            speeds = Speeds(inside=config.mesh.link_bandwidth * 1e9)
            estimate = tokens_per_second(config, step_time(config, speeds, "balanced"))
            real = record["result"]["tokens_per_second"]
            name = " ".join(word for word in (path.stem, record.get("name")) if word)
            yield {"name": name, "measured": real, "estimated": estimate, "error": estimate / real - 1}


def config_of(record: dict[str, Any]) -> Config:
    """The config of a measurement, of whatever version: keys that are no more are left out."""
    known = {
        name: {key: value for key, value in record["config"].get(name, {}).items() if key in table.fields}
        for name, table in tables().items()
    }
    known["data"] = {}
    known["model"]["vocab_size"] = known["model"].get("vocab_size") or 257
    return settle_accumulate(settle(resolve(build(known), record["ranks"])))


def error_lines(measured: list[dict[str, Any]]) -> list[str]:
    """How far the estimate is from what was measured."""
    if not measured:
        return ["No measurement of bench train is at hand (docs/results): the estimate stands alone."]
    errors = [m["error"] for m in measured]
    worst = max(measured, key=lambda m: abs(m["error"]))
    middle = median(abs(error) for error in errors)
    head = (
        f"estimated against {len(measured)} measured steps of bench train: tokens/s off by {middle:.0%} in the median, "
        f"{_error(worst)} at worst ({worst['name']}); steps that the host bounds are estimated too fast"
    )
    return [head, *(f"  {m['name']}: {m['measured']:,.0f} measured, {_error(m)}" for m in measured)]


def _error(measurement: dict[str, Any]) -> str:
    error = measurement["error"]
    return f"{error:+.0%}" if error < 9 else f"{error + 1:,.0f} times as much"


def _to_json(found: Found, measured: list[dict[str, Any]]) -> dict[str, Any]:
    def plain(candidate: Candidate) -> dict[str, Any]:
        return {
            "mesh": candidate.mesh,
            "keys": candidate.keys,
            "memory_bytes": asdict(candidate.memory) | {"peak": candidate.memory.peak},
            "skewed_peak_bytes": candidate.skewed_peak,
            "tokens_per_second": {routing: candidate.speed(routing) for routing in ROUTINGS},
            "seconds": {routing: asdict(candidate.time(routing)) for routing in ROUTINGS},
        }

    return {
        "tried": found.tried,
        "best": [plain(candidate) for candidate in found.best],
        "too_large": [plain(candidate) for candidate in found.too_large],
        "refused": found.refused,
        "measured": measured,
    }
