"""The table of ``verify --hf``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource
from moe_dtensor.config.command_line import write_json
from moe_dtensor.verify.compare import Deviation, Verdict
from moe_dtensor.verify.hugging_face import explain, prove_folder


def report(folder: Path, dtypes: Sequence[str], json_file: Path | None = None) -> int:
    """Print a row for each dtype and what is wrong below; 1 if anything is, else 0."""
    source = HuggingFaceSource(folder)
    console = Console(width=None if Console().is_terminal else 160)
    family = source.described.family
    table = Table(title=f"{folder}: {family.architecture} against one plain float64 process", title_justify="left")
    for column in ("dtype", "logits", "loss", "gradients", "worst gradient", "error", "ratio of norms", "s", ""):
        table.add_column(column, overflow="fold")
    verdicts = list(prove_folder(source, dtypes))
    for verdict in verdicts:
        worst = worst_gradient(verdict)
        table.add_row(
            verdict.mesh,
            *(f"{verdict.largest(kind):.1e}" for kind in ("logits", "loss", "gradient")),
            worst.name,
            f"{worst.error:.1e}",
            f"{worst.ratio:.6g}",
            f"{verdict.seconds:.1f}",
            "ok" if verdict.ok else "FAIL",
            style=None if verdict.ok else "red",
        )
    console.print(table)
    for verdict in verdicts:
        if not verdict.ok:
            console.print(f"{verdict.mesh}:", markup=False, highlight=False)
            for line in explain(verdict, source):
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if json_file:
        write_json(json_file, [v.to_json() for v in verdicts])
    return 0 if all(v.ok for v in verdicts) else 1


def worst_gradient(verdict: Verdict) -> Deviation:
    """The gradient that is farthest off."""
    return max((d for d in verdict.deviations if d.kind == "gradient"), key=lambda d: d.error)
