"""What ``verify`` tells: a table, and the file of ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from moe_dtensor.bench.measure import provenance
from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.compare import Verdict
from moe_dtensor.verify.miniature import Case

COLUMNS = {
    "loss": ("loss",),
    "gradients": ("gradient",),
    "grad norm": ("grad_norm",),
    "after step": ("moment", "update", "parameter", "state"),
    "validation": ("validation",),
    "routing": ("routing", "statistic"),
}
"""Kinds of what is compared by where the largest error of them is shown."""


class Report:
    """A context manager; rows are added as they are known, failures explained below the table."""

    def __init__(self, miniature: Config, dtype: str, console: Console | None = None) -> None:
        # Piped output has no width of its own, and a broken line is hard to search.
        self.console = console or Console(width=None if Console().is_terminal else 176)
        self.verdicts: list[Verdict] = []
        self.table = Table(title=_title(miniature, dtype), title_justify="left")
        for column in ("mesh", "schedule", *COLUMNS):
            self.table.add_column(column)
        for column in ("worst", "error", "ratio of norms"):
            self.table.add_column(column, overflow="fold")
        self.table.add_column("s", justify="right")
        self.table.add_column("")
        self.live = Live(self.table, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Report:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)
        if not self.console.is_terminal:
            # Live leaves the cursor at the end of the table's last line.
            self.console.print()
        for verdict in self.verdicts:
            if not verdict.ok:
                self.console.print(_explain(verdict), markup=False, highlight=False)

    def add(self, verdict: Verdict) -> None:
        """Show one more row."""
        self.verdicts.append(verdict)
        worst = verdict.worst
        errors = ["-" if verdict.failure else f"{max(map(verdict.largest, kinds)):.1e}" for kinds in COLUMNS.values()]
        self.table.add_row(
            verdict.mesh,
            verdict.schedule,
            *errors,
            worst.name,
            f"{worst.error:.1e}",
            f"{worst.ratio:.6g}",
            f"{verdict.seconds:.1f}",
            "ok" if verdict.ok else "FAIL",
            style=None if verdict.ok else "red",
        )


def _title(config: Config, dtype: str) -> str:
    model, moe, training = config.model, config.moe, config.training
    experts = f"{moe.num_experts} experts, top {moe.top_k}, {moe.router}" if moe.num_experts else "dense"
    return (
        f"Against one plain float64 process: {model.num_layers} blocks, {model.dim} wide, {model.num_heads} heads, "
        f"{experts}, {training.global_batch_size} x {training.seq_len} tokens, {dtype}"
    )


def _explain(verdict: Verdict) -> str:
    head = f"{verdict.mesh} {verdict.schedule}: "
    if verdict.failure:
        return head + verdict.failure
    failed = sorted((d for d in verdict.deviations if not d.ok), key=lambda d: d.severity, reverse=True)
    lines = [
        f"  {d.kind:<9} {d.name:<44} step {d.step}: error {d.error:.2e} (limit {d.limit:.0e}), "
        f"{d.ratio:.6g} times the oracle's norm"
        for d in failed[:8]
    ]
    more = [f"  … and {len(failed) - 8} more"] if len(failed) > 8 else []
    return "\n".join([f"{head}{len(failed)} of {len(verdict.deviations)} quantities differ", *lines, *more])


def write_record(path: Path, verdicts: Sequence[Verdict], cases: Sequence[tuple[str, Case]], compiled: bool) -> None:
    """A list of one object for each verdict; each has commit, device, versions, dtype, kernels and whether compiled."""
    rests_on = provenance() | {"compiled": compiled}
    rows: list[dict[str, Any]] = [
        verdict.to_json()
        | {
            "dtype": case.config.training.param_dtype,
            "backend": case.config.moe.backend,
            "variant": name,
            **rests_on,
            "device": rests_on["device"] if torch.cuda.device_count() >= case.layout.world_size else "cpu",
        }
        for verdict, (name, case) in zip(verdicts, cases, strict=True)
    ]
    write_json(path, rows)
