"""Where records go: the terminal, a JSON-lines file, TensorBoard, Weights & Biases.

A record is a dict with ``step``, scalars, texts, and per-layer values as ``{name: {layer: value}}``. One process
(rank 0) owns the sinks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config

Record = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"


class Sink(Protocol):
    """Takes records, in the order of their steps."""

    def log(self, record: Record) -> None:
        """Take one step's record."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines:
    """One JSON object per line, on disk as soon as it is logged. A value that is not finite is ``null``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        """Append the record."""
        self._file.write(json.dumps(_json(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard events; per-layer values are ``<name>/layer_<i>``, a text is written when it changes.

    Args:
        folder: of the event files.
        start_step: steps already taken. Later events, of a run cut short, are hidden.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._texts: dict[str, str] = {}

    def log(self, record: Record) -> None:
        """Add one point to every curve."""
        for name, value in _flat(record):
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, record["step"])
            elif self._texts.get(name) != value:
                self._texts[name] = value
                self._writer.add_text(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; a resumed run goes on in the same chart (by ``run_id``)."""

    def __init__(self, config: Config, folder: Path, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.metrics.wandb_project,
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow",
            config=asdict(config),
        )

    def log(self, record: Record) -> None:
        """Send one step."""
        self._run.log(dict(_flat(record)), step=record["step"])

    def close(self) -> None:
        """Wait for what is not sent yet."""
        self._run.finish()


def check_sinks(config: Config) -> None:
    """Raise ConfigError if a sink asked for is not installed. Cheap: every rank calls it at start-up."""
    if config.metrics.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.wandb = true needs the package wandb, which is not installed.",
            'Run `pip install "moe_dtensor[wandb]"` (from a clone: `pip install -e ".[wandb]"`), '
            "or set metrics.wandb = false.",
        )


def build_sinks(config: Config, folder: Path, run_id: str, start_step: int) -> list[Sink]:
    """Open the sinks of ``[metrics]`` in the run's folder, to go on after ``start_step`` steps."""
    check_sinks(config)
    sinks: list[Sink] = [JsonLines(folder / METRICS_FILE)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(folder / TENSORBOARD_FOLDER, start_step))
    if config.metrics.wandb:
        sinks.append(Wandb(config, folder, run_id))
    return sinks


def _flat(record: Record) -> Iterator[tuple[str, float | str]]:
    for name, value in record.items():
        if isinstance(value, dict):
            for layer, entry in value.items():
                yield f"{name}/layer_{layer}", entry
        elif name != "step":
            yield name, value


def _json(value: Any) -> Any:
    """The value with what JSON cannot say (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if TYPE_CHECKING:
    from rich.progress import Progress

_LINES_KEPT = 20
_WIDTH_FOR_BAR = 120


class Display:
    """Shows records; a sink like the others, and takes messages besides.

    On a terminal the live line is renewed with each record, and about twenty of a run stay on the screen.

    Args:
        steps: steps of the whole run.
        start_step: steps already taken.
        every: show each ``every``-th step, and the last.
        stream: standard output by default.
    """

    def __init__(self, steps: int, start_step: int = 0, every: int = 1, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._every = every
        self._stream = stream or sys.stdout
        self._keep_every = every * max(1, steps // every // _LINES_KEPT)
        self._progress: Progress | None = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(file=self._stream, highlight=False)
            room = console.width >= _WIDTH_FOR_BAR
            bar = [BarColumn(bar_width=16), TimeRemainingColumn(compact=True)] if room else []
            # No thread of its own: it redraws when there is something new.
            self._progress = Progress(TextColumn("{task.description}"), *bar, console=console, auto_refresh=False)
            self._task = self._progress.add_task("starting", total=steps, completed=start_step)
            self._progress.start()
            # Left visible: a run that is killed cannot give it back.
            console.show_cursor(True)

    def log(self, record: Record) -> None:
        """Show a step's record."""
        if record["step"] % self._every and record["step"] != self._steps:
            return
        line = format_record(record, self._steps)
        if self._progress is None:
            self.say(line)
            return
        if record["step"] % self._keep_every == 0 and record["step"] != self._steps:
            self.say(line)
        self._progress.update(self._task, description=line, completed=record["step"], refresh=True)

    def say(self, message: str) -> None:
        """Show a message, above the live line if there is one."""
        if self._progress is None:
            print(message, file=self._stream, flush=True)
        else:
            self._progress.console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last live line and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def format_record(record: Record, steps: int) -> str:
    """One line: ``step 12/1000  loss 4.2312  grad 1.23  lr 3.0e-04  12,345 tok/s  …``; absent values are left out."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    for name, form in (
        ("loss", "loss {:.4f}"),
        ("validation_loss", "validation {:.4f}"),
        ("grad_norm", "grad {:.2f}"),
        ("lr", "lr {:.1e}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "MFU {:.1%}"),
        ("peak_memory_gib", "{:.2f} GiB"),
    ):
        if name in record:
            parts.append(form.format(record[name]))
    loads = record.get("expert_load_max_over_mean")
    if loads:
        parts.append(f"load {max(loads.values()):.2f}")
    if "forced_router" in record:
        parts.append(f"router {record['forced_router']} (forced)")
    return "  ".join(parts)
