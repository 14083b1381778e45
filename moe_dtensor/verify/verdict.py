"""How far a mesh is from the oracle and where it is worst: the verdict, and the table and the file that tell it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

from moe_dtensor.bench.measure import provenance
from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.miniature import Case

FLOOR = 1e-6
"""A gradient smaller than this share of the global norm is measured against that share."""

KINDS = (
    "stream",
    "logits",
    "routing",
    "statistic",
    "gradient",
    "loss",
    "grad_norm",
    "moment",
    "update",
    "parameter",
    "state",
    "validation",
)
"""What is compared, in the order in which one thing explains another."""
RELATIVE = ("gradient", "moment", "update")
"""What the reference backend tells the limit of, in bfloat16."""
FORWARD = ("routing", "statistic")
"""Of MoE blocks: what is routed otherwise is another computation from that block on."""


@dataclass(frozen=True)
class Deviation:
    """One compared quantity. ``ratio`` is the norm found over the oracle's: 4.0 reads as "four times too large"."""

    name: str
    kind: str
    error: float
    ratio: float
    limit: float
    step: int = 1

    @property
    def ok(self) -> bool:
        """Within the limit; NaN never is."""
        return self.error <= self.limit

    @property
    def severity(self) -> tuple[bool, tuple[int, ...], float]:
        """Larger is worse: failures first, of them what comes first in a run, then by how far beyond the limit.

        Of what passes a gradient is told: it says most.
        """
        excess = self.error / self.limit if self.limit else self.error
        first = (self.kind == "gradient",) if self.ok else (-self.step, -self._layer, -KINDS.index(self.kind))
        return not self.ok, first, math.inf if math.isnan(excess) else excess

    @property
    def told(self) -> str:
        """How far it is off."""
        return f"error {self.error:.2e} (limit {self.limit:.0e}), {self.ratio:.6g} times the oracle's norm"

    @property
    def _layer(self) -> int:
        """Block of what a forward pass shows; whatever else there is comes after all blocks."""
        return int(self.name.split(".")[1]) if self.kind in FORWARD else sys.maxsize


@dataclass(frozen=True)
class Verdict:
    """Everything compared for one mesh and schedule; ``schedule`` is ``none`` without a pipeline."""

    mesh: str
    schedule: str
    deviations: tuple[Deviation, ...]
    seconds: float = 0.0
    failure: str = ""
    """What a rank raised, if none of this could be compared."""
    experts_ran_as: str = ""
    """The backend of the experts, whatever ``auto`` came to."""

    @property
    def ok(self) -> bool:
        """Whether everything is within its limit."""
        return all(d.ok for d in self.deviations)

    @property
    def worst(self) -> Deviation:
        """The quantity to look at first."""
        return max(self.deviations, key=lambda d: d.severity)

    def failures(self) -> list[Deviation]:
        """All that is beyond its limit, the worst first."""
        return sorted((d for d in self.deviations if not d.ok), key=lambda d: d.severity, reverse=True)

    def failed(self) -> list[str]:
        """Names of all that deviates, each once."""
        return list(dict.fromkeys(d.name for d in self.deviations if not d.ok))

    def to_json(self) -> dict[str, Any]:
        """The object that ``verify --json`` writes; numbers that JSON lacks become text."""
        worst = {f"worst_{key}": _plain(value) for key, value in asdict(self.worst).items()}
        errors = {kind: _plain(self.largest(kind)) for kind in KINDS}
        return {
            "mesh": self.mesh,
            "schedule": self.schedule,
            "ok": self.ok,
            **worst,
            "errors": errors,
            "compared": len(self.deviations),
            "failed": self.failed(),
            "failure": self.failure,
            "experts_ran_as": self.experts_ran_as,
            "seconds": round(self.seconds, 2),
        }

    def largest(self, kind: str) -> float:
        """Largest error of one kind; NaN counts as infinite."""
        errors = [d.error for d in self.deviations if d.kind == kind]
        return max((math.inf if math.isnan(e) else e for e in errors), default=0.0)


def deviate(name: str, kind: str, found: Tensor, expected: Tensor, limit: float, scale: float) -> Deviation:
    """``‖found - expected‖ / max(‖expected‖, 1e-6 * scale)``; a wrong shape is infinitely wrong.

    Args:
        scale: the oracle's global gradient norm.
    """
    if found.shape != expected.shape:
        return Deviation(name, kind, math.inf, math.nan, limit)
    found, expected = found.detach().cpu().double(), expected.double()
    size = float(expected.norm())
    error = float((found - expected).norm()) / max(size, FLOOR * scale, 1e-300)
    norm = float(found.norm())
    return Deviation(name, kind, error, norm / size if size else (1.0 if norm == 0 else math.inf), limit)


def deviate_scalar(
    name: str, kind: str, found: float, expected: float, limit: float, floor: float = 1e-300
) -> Deviation:
    """Relative difference; two equal infinities agree. What is smaller than ``floor`` is measured against that."""
    ratio = found / expected if expected else (1.0 if found == expected else math.inf)
    error = 0.0 if found == expected else abs(found - expected) / max(abs(expected), floor)
    return Deviation(name, kind, error, ratio, limit)


def missing(name: str, kind: str, limit: float) -> Deviation:
    """A parameter that no rank has, or that has no gradient, or that the oracle does not know."""
    return Deviation(name, kind, math.inf, 0.0, limit)


def worst_of_each(deviations: Iterable[Deviation]) -> tuple[Deviation, ...]:
    """Of the same quantity seen by several ranks keep the worst: every replica has to be right."""
    kept: dict[tuple[str, str], Deviation] = {}
    for deviation in deviations:
        key = (deviation.name, deviation.kind)
        if key not in kept or deviation.severity > kept[key].severity:
            kept[key] = deviation
    return tuple(kept.values())


def relative_to(
    found: Iterable[Deviation], reference: Iterable[Deviation], factor: float, least: float
) -> Iterator[Deviation]:
    """The same deviations, those of :data:`RELATIVE` judged by ``factor`` times the reference backend's error on them.

    A gradient and a moment by the error on the same tensor; an update, in which a rounded sign counts whole and a small
    tensor has few of them, by the largest of the step. Their own limit stays the most that is allowed: where the
    reference is wrong too, both fail.

    Args:
        found: of the backend in question.
        reference: of the reference backend.
        factor: how many times its error is allowed.
        least: an error of the reference below this counts as this.
    """
    errors: dict[tuple[str, str, int], float] = {}
    for d in reference:
        for key in ((d.name, d.kind, d.step), ("", d.kind, d.step)):
            errors[key] = max(errors.get(key, 0.0), d.error)
    for d in found:
        own = factor * max(errors["" if d.kind == "update" else d.name, d.kind, d.step], least)
        # A limit of 0 is a number that has to be equal.
        yield replace(d, limit=min(d.limit, own)) if d.kind in RELATIVE and d.limit else d


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    failed = verdict.failures()
    lines = [f"  {d.kind:<9} {d.name:<44} step {d.step}: {d.told}" for d in failed[:8]]
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
