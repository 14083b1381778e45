"""What an evaluation found: a table for the terminal, and a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dtensor.config.command_line import write_json
from moe_dtensor.evaluate.text import TextResult


@dataclass
class Report:
    """Of one model."""

    checkpoint: str
    mesh: str
    """``dp x pp x tp``."""
    param_dtype: str
    max_length: int
    stride: int
    data: dict[str, dict[str, float]] = field(default_factory=dict)
    multiple_choice: dict[str, dict[str, float]] = field(default_factory=dict)
    lm_eval: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_json(path, asdict(self))

    def show(self) -> None:
        """Print a table of each kind."""
        console = Console(highlight=False, width=None if Console().is_terminal else 120)
        columns = ("perplexity", "bits_per_byte", "loss", "documents", "tokens", "bytes")
        if self.data:
            console.print(_table("text", self.data, columns))
        if self.multiple_choice:
            measures = tuple(dict.fromkeys(key for row in self.multiple_choice.values() for key in row))
            console.print(_table("multiple choice", self.multiple_choice, measures))
        if self.lm_eval:
            table = Table("lm-eval", "metric", "value")
            for name, row in self.lm_eval.items():
                for metric, value in row.items():
                    table.add_row(name, metric, _cell(value))
            console.print(table)


def text_entry(result: TextResult) -> dict[str, float]:
    """A text's entry in the report."""
    measured = {key: getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte")}
    return asdict(result) | measured


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table(title, *(name.replace("_", " ") for name in columns))
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4e}"
