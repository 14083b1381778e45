"""``plan``: what a config would hold, compute and send on a mesh. Loads no torch, needs no GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import Parser, write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import expert_ranks, lent_experts, microbatches, moe_layers, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import DispatchCost, Name, cheaper, dispatch_costs, settle
from moe_dtensor.estimate.memory import Memory, fullest_rank, settle_accumulate
from moe_dtensor.estimate.shards import Folded, all_shards, flops_per_token, fold, parameters
from moe_dtensor.estimate.sizes import BYTES, allocated_rows, expert_rows, expert_weights, tokens_at_experts
from moe_dtensor.estimate.speed import SOURCES, bubble, busiest_rank
from moe_dtensor.estimate.traffic import Traffic, traffic
from moe_dtensor.verbs.plan_search import add_options, run_search

HELP = "placement, memory, FLOPs and bytes moved on any mesh (no torch, no GPU)"
GIB, MIB = 2**30, 2**20
BYTE_TOKENS = 257
"""Vocabulary of the byte tokenizer: 256 values and an end token."""


@dataclass(frozen=True)
class ExpertRows:
    """What comes to a rank's experts under the dispatch that runs: (balanced, skewed)."""

    tokens: tuple[int, int]
    """Vectors at hand."""
    copies: tuple[int, int]
    """Copies for the rank's experts."""
    exact: tuple[int, int]
    """Rows made room for under ``moe.rows = exact``."""
    worst: tuple[int, int]
    """The same under ``worst``."""


@dataclass(frozen=True)
class Plan:
    """All that ``plan`` says about one mesh."""

    mesh: str
    config: Config
    """Resolved, ``mesh.dispatch`` too."""
    parameters: list[Folded]
    balanced: tuple[int, Memory]
    """The fullest pipeline rank and its memory in bytes, each expert getting as many copies."""
    skewed: tuple[int, Memory]
    """The same where all tokens prefer one rank's experts, on that rank."""
    rows: ExpertRows | None
    """Of one MoE block and microbatch on a rank; None for a dense model."""
    dispatch: dict[Name, DispatchCost]
    """The cost of each dispatch that ``mesh.experts`` allows, of one MoE block and microbatch; empty where tokens and
    their experts are together anyway."""
    flops: float
    """Of a step, on all ranks."""
    traffic: Traffic
    bubble: float
    """Share of the time that a pipeline rank waits."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs, shapes."""
        rows = [
            {"name": f.pattern, "count": f.count, "shape": f.shard.shape, "dp": f.shard.row.dp, "tp": f.shard.row.tp}
            | {"local": f.shard.local}
            for f in self.parameters
        ]
        memory = {
            name: {"pipeline_rank": rank} | asdict(m) | {"peak": m.peak}
            for name, (rank, m) in (("balanced", self.balanced), ("skewed", self.skewed))
        }
        return {
            "mesh": self.mesh,
            "parameters": rows,
            "total_parameters": parameters(self.config)[0],
            "active_parameters": parameters(self.config)[1],
            "memory_bytes": memory,
            "expert_rows": None if self.rows is None else _by_routing(self.rows),
            "dispatch": {name: _cost_to_json(cost) for name, cost in self.dispatch.items()},
            "dispatch_in_use": self.config.mesh.dispatch if self.dispatch else None,
            "dispatch_of_auto": cheaper(self.dispatch) if self.dispatch else None,
            "flops_per_step": self.flops,
            "bytes_sent_per_step": asdict(self.traffic),
            "bubble": self.bubble,
            "config": asdict(self.config),
        }


def _by_routing(rows: ExpertRows) -> dict[str, dict[str, int]]:
    return {name: {"balanced": pair[0], "skewed": pair[1]} for name, pair in vars(rows).items()}


def _cost_to_json(cost: DispatchCost) -> dict[str, Any]:
    return {
        "bytes_sent": cost.sent,
        "collectives": cost.collectives,
        "reads": cost.reads,
        "microseconds": round(cost.seconds * 1e6, 3),
        "microseconds_moving": round(cost.moving * 1e6, 3),
    }


def main(argv: list[str]) -> int:
    """Print a plan for each mesh, or why it cannot run the config; then 2 if one of them cannot, else 0."""
    parser = Parser("plan", HELP)
    parser.add_argument("--meshes", nargs="+", metavar="DPxPPxTP", help="default: [mesh] of the config")
    parser.add_argument(
        "--world", type=int, metavar="N", help="ranks for [mesh] (default: NGPU, else what it asks for)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the plans to a file, in bytes")
    add_options(parser)
    options, config = parser.load(argv)
    config = with_vocabulary(config)
    console = Console(width=None if os.isatty(1) else 120)
    if options.search:
        return run_search(config, options, console)
    records: list[dict[str, Any]] = []
    for placed, world_size in [_place(config, mesh, options.world) for mesh in options.meshes or [None]]:
        mesh = "x".join(map(str, (placed.mesh.dp, placed.mesh.pp, placed.mesh.tp)))
        try:
            plan = make_plan(placed, world_size)
        except ConfigError as error:
            console.print(f"{mesh} cannot run: {error}\n", style="red", highlight=False, markup=False)
            records.append({"mesh": mesh, "refused": str(error)})
        else:
            show(plan, console)
            records.append(plan.to_json())
    if options.json:
        write_json(options.json, records)
    return 2 if any("refused" in record for record in records) else 0


def with_vocabulary(config: Config) -> Config:
    """Fill in the byte tokenizer's vocabulary; another tokenizer is not loaded here.

    Raises:
        ConfigError: the vocabulary is left to a tokenizer file.
    """
    if config.model.vocab_size:
        return config
    if config.data.tokenizer != "bytes":
        raise ConfigError(
            f"model.vocab_size = 0 leaves the vocabulary to {config.data.tokenizer}, which plan does not load.",
            "Add --model.vocab_size N.",
        )
    return replace(config, model=replace(config.model, vocab_size=BYTE_TOKENS))


def make_plan(config: Config, world_size: int) -> Plan:
    """The plan of a config that names its vocabulary.

    Raises:
        ConfigError: so many ranks cannot run it.
    """
    check(config, world_size, here=False)
    config = resolve(config, world_size)
    costs = dispatch_costs(config) if _sends_tokens(config) else {}
    config = settle_accumulate(settle(config))
    training, mesh = config.training, config.mesh
    return Plan(
        mesh=f"{mesh.dp}x{mesh.pp}x{mesh.tp}",
        config=config,
        parameters=fold(all_shards(config)),
        balanced=fullest_rank(config),
        skewed=fullest_rank(config, skewed=True),
        rows=_rows(config) if moe_layers(config) else None,
        dispatch=costs,
        flops=flops_per_token(config) * training.global_batch_size * training.seq_len,
        traffic=traffic(config),
        bubble=bubble(config),
    )


def _sends_tokens(config: Config) -> bool:
    """Whether some token's experts, or slices of them, are on another rank than the token."""
    over_tp = config.mesh.experts in ("tp", "tp_hidden", "dp_tp") and config.mesh.tp > 1
    return bool(moe_layers(config)) and (over_tp or expert_ranks(config) > 1)


def _rows(config: Config) -> ExpertRows:
    def both(count: Callable[..., int], *more: str) -> tuple[int, int]:
        return count(config, False, *more), count(config, True, *more)

    return ExpertRows(
        tokens=both(tokens_at_experts),
        copies=both(expert_rows),
        exact=both(allocated_rows, "exact"),
        worst=both(allocated_rows, "worst"),
    )


def _place(config: Config, mesh: str | None, world: int | None) -> tuple[Config, int]:
    """The config on a mesh of the command line, and its ranks; or on its own mesh."""
    if mesh is None:
        own = max(1, config.mesh.dp) * config.mesh.pp * config.mesh.tp
        return config, world if world is not None else int(os.environ.get("NGPU", own))
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", mesh)
    if not match:
        raise ConfigError(f"--meshes {mesh}: not a mesh.", "Write DPxPPxTP, such as 8x2x8.")
    dp, pp, tp = map(int, match.groups())
    return replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp)), dp * pp * tp


def show(plan: Plan, console: Console) -> None:
    """Print the parameters' table and the summary."""
    mesh = plan.config.mesh
    table = Table(title=f"dp={mesh.dp} x pp={mesh.pp} x tp={mesh.tp}: parameters", title_justify="left")
    for column in ("name", "count", "shape", "dp splits", "tp splits", "one rank's"):
        table.add_column(column, justify="right" if column == "count" else "left", no_wrap=True)
    for folded in plan.parameters:
        row = folded.shard.row
        on_tp = "-" if row.tp is None else f"dim {row.tp}"
        on_dp = f"dim {row.dp}" if row.fsdp else f"dim {row.dp}, not FSDP"
        on_dp += f", dim {row.groups} across groups" if row.groups is not None else ""
        shape, local = _shape(folded.shard.shape), _shape(folded.shard.local)
        table.add_row(folded.pattern, str(folded.count), shape, on_dp, on_tp, local)
    console.print(table)
    console.print(_memory_table(plan))
    for line in _lines(plan):
        console.print(line, highlight=False, markup=False)
    console.print()


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _memory_table(plan: Plan) -> Table:
    """GiB of the fullest rank, balanced and skewed."""
    table = Table(title="memory of the fullest rank, GiB", title_justify="left")
    table.add_column("routing")
    for routing, (pp_rank, _) in (("balanced", plan.balanced), ("skewed", plan.skewed)):
        table.add_column(f"{routing} (pp rank {pp_rank})" if plan.config.mesh.pp > 1 else routing, justify="right")
    names = {
        "weights": "master weights",
        "gradients": f"gradients{_accumulated(plan.config)}",
        "moments": "AdamW moments",
        "compute_copy": f"compute copy (reshard_after_forward = {plan.config.fsdp.reshard_after_forward})",
        "expert_copy": "compute copy of experts outside of FSDP",
        "activations": "activations kept",
        "buffers": "pipeline receive buffers",
        "workspaces": "cuBLAS workspaces",
        "at_loss": "at the loss: logits *",
        "at_block": "in a block's backward *",
        "at_reduce": "in a block's reduce-scatter *",
        "peak": "peak (of * the largest)",
    }
    if not plan.balanced[1].expert_copy:
        del names["expert_copy"]
    for field, text in names.items():
        balanced, skewed = (getattr(memory, field) / GIB for _, memory in (plan.balanced, plan.skewed))
        table.add_row(text, f"{balanced:.2f}", f"{skewed:.2f}", end_section=field in ("workspaces", "at_reduce"))
    return table


def _accumulated(config: Config) -> str:
    several = microbatches(config) > 1 or config.mesh.pp > 1
    return f" (accumulate = {config.fsdp.accumulate})" if several else ", which come as activations go"


def _lines(plan: Plan) -> list[str]:
    config, mesh = plan.config, plan.config.mesh
    total, active = parameters(config)
    ranks, count = mesh.dp * mesh.pp * mesh.tp, microbatches(config)
    sent = plan.traffic
    lines = [
        f"parameters     {total / 1e6:,.1f}M, {active / 1e6:,.1f}M active in a token",
        f"step           {config.training.global_batch_size} sequences of {config.training.seq_len}, "
        f"{count} microbatches of {config.training.microbatch_size} on each dp rank",
        f"FLOPs a step   {plan.flops / 1e12:,.1f} T, {plan.flops / ranks / 1e12:,.1f} T a rank; "
        "recomputation not counted",
        f"sent a step    by a rank, GiB: dp {sent.dp / GIB:.2f}, pp {sent.pp / GIB:.2f}, tp {sent.tp / GIB:.2f}"
        + (f", dp_tp {sent.dp_tp / GIB:.2f}" if sent.dp_tp else ""),
        *(_rows_lines(plan.rows, config) if plan.rows else []),
        *_lent_lines(config),
        *_dispatch_lines(plan),
    ]
    if mesh.pp > 1:
        schedule = config.pipeline.schedule
        lines.append(f"bubble         {plan.bubble:.1%} under {schedule}: {SOURCES[schedule]}")
    return lines


def _rows_lines(rows: ExpertRows, config: Config) -> list[str]:
    line = f"expert rows    {rows.copies[0]:,} a block and microbatch if balanced, at most {rows.copies[1]:,}"
    if rows.exact == rows.worst:
        return [f"{line}; room for {_one_or_two(rows.exact)}, whatever moe.rows"]
    return [
        line,
        f"  room for     {_one_or_two(rows.exact)} under moe.rows = exact, {_one_or_two(rows.worst)} under worst "
        f"(moe.rows = {config.moe.rows})",
    ]


def _lent_lines(config: Config) -> list[str]:
    """What lent experts weigh, and what they make of a skewed load."""
    lent, ranks = lent_experts(config), expert_ranks(config)
    if not lent:
        return []
    alone = replace(config, mesh=replace(config.mesh, lent_experts=0))
    before, after = busiest_rank(alone, "skewed"), busiest_rank(config, "skewed")
    size = ranks * lent * sum(expert_weights(config)) * BYTES[config.training.param_dtype]
    return [
        f"lent experts   {lent} of each of {ranks} ranks, {size / MIB:,.1f} MiB a block; under zipf the busiest rank "
        f"has {after:.2f} times the mean, alone {before:.2f}"
    ]


def _one_or_two(rows: tuple[int, int]) -> str:
    """Balanced, and skewed where that differs."""
    return f"{rows[0]:,}" if rows[0] == rows[1] else f"{rows[0]:,} to {rows[1]:,}"


def _dispatch_lines(plan: Plan) -> list[str]:
    """Each dispatch's cost, a star at the one that runs, and which one ``auto`` takes and why."""
    lines = []
    for name, cost in plan.dispatch.items():
        star = " *" if name == plan.config.mesh.dispatch else ""
        lines.append(
            f"{name + star:<14} {cost.seconds * 1e6:,.0f} us a block and microbatch: {cost.moving * 1e6:,.0f} for "
            f"{cost.total / MIB:,.1f} MiB sent, the rest for {cost.collectives} collectives and {cost.reads} reads"
        )
    # Lent experts leave no choice.
    return [*lines, f"auto takes     {_why(plan.dispatch)}"] if lines and not lent_experts(plan.config) else lines


def _why(costs: dict[Name, DispatchCost]) -> str:
    best = cheaper(costs)
    if len(costs) == 1:
        return f"{best}: each tp rank has a slice of every expert"
    taken, other = costs[best], next(cost for name, cost in costs.items() if name != best)
    saved = (other.seconds - taken.seconds) * 1e6
    bytes_saved, waits_saved = (other.moving - taken.moving) * 1e6, (other.waiting - taken.waiting) * 1e6
    terms = ((bytes_saved, "the bytes"), (waits_saved, "collectives and reads"))
    parts = [f"{abs(us):,.0f} us {'less' if us > 0 else 'more'} for {what}" for us, what in terms if round(us)]
    return f"{best}: {' and '.join(parts)}" if round(saved) else f"{best}: both take as long"
