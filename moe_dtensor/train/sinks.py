"""Where records go: the terminal, a JSON-lines file, TensorBoard, Weights & Biases.

A record is a dict with ``step``, scalars, texts, per-layer values as ``{name: {layer: value}}``, those of sources and
evaluated texts by their names, and samples as ``{prompt: continuation}``. One process (rank 0) owns the sinks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TextIO

from moe_dtensor.config.errors import RunError
from moe_dtensor.config.schema import Config

Record = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
_BLOCK = 1 << 16


class Sink(Protocol):
    """Takes records, in the order of their steps."""

    def log(self, record: Record) -> None:
        """Take one step's record."""

    def close(self) -> None:
        """Write what is buffered."""


class Owner:
    """Writes nothing; before the sinks that do, it sees that this process still holds the run.

    Args:
        check: raises where it does not.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def log(self, record: Record) -> None:
        """Raise if another process has taken the run over."""
        self._check()

    def close(self) -> None:
        """Nothing is open."""


class JsonLines:
    """One JSON object per line, on disk as soon as it is logged. A value that is not finite is ``null``.

    The file is made with the first record. A record that cannot be written (disk full) is kept and written with the
    next one; the file never holds half a line that another follows.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._pending: list[bytes] = []
        self.failing = False
        """Whether the last record could not be written."""

    def log(self, record: Record) -> None:
        """Append the record."""
        self._pending.append((json.dumps(_json(record), allow_nan=False) + "\n").encode())
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._write(self._file)
        except OSError as error:
            if not self.failing:
                say_aside(f"warning: {self._path} cannot be written ({error.strerror}); records wait in memory.")
            self.failing = True
            return
        self.failing = False

    def _write(self, file: BinaryIO) -> None:
        end = file.seek(0, os.SEEK_END)
        text = b"".join(self._pending)
        try:
            if (written := file.write(text)) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path), written)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
        self._pending.clear()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the records of steps after ``step`` from a metrics file, and a last line that was cut short.

    Reads from the end: a long run's file is not read whole.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        for start, line in _lines_backward(file):
            if line.endswith(b"\n") and _step_of(line) <= step:
                break
            end = start
        file.truncate(end)


def last_step(path: Path) -> int:
    """Step of the last whole record of a metrics file; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return next((int(_step_of(line)) for _, line in _lines_backward(file) if _step_of(line) < math.inf), 0)


def _lines_backward(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Place and content of each line, the last first."""
    start = file.seek(0, os.SEEK_END)
    rest = b""
    while start > 0:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        lines = (file.read(size) + rest).splitlines(keepends=True)
        rest, place = lines[0], start + sum(map(len, lines))
        for line in reversed(lines[1:]):
            place -= len(line)
            yield place, line
    if rest:
        yield 0, rest


def _step_of(line: bytes) -> float:
    """Step of a metrics record; infinite for a line cut short by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def say_aside(text: str) -> None:
    """Print to stderr, which may be closed or full."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class TensorBoard:
    """TensorBoard events; per-layer values are ``<name>/layer_<i>``, those of sources ``<name>/<source>``, a text is
    written when it changes.

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

        try:
            self._run = wandb.init(
                project=config.metrics.wandb_project,
                name=folder.name,
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=asdict(config),
            )
        except Exception as error:  # of the network, the account or the project: the library has several kinds
            raise RunError(
                f"Weights & Biases could not be started ({type(error).__name__}: {error}).",
                "Mend that, or set WANDB_MODE=offline or metrics.wandb = false: the run resumes.",
            ) from error

    def log(self, record: Record) -> None:
        """Send one step."""
        self._run.log(dict(_flat(record)), step=record["step"])

    def close(self) -> None:
        """Wait for what is not sent yet."""
        self._run.finish()


def build_sinks(config: Config, folder: Path, run_id: str, start_step: int) -> list[Sink]:
    """Open the sinks of ``[metrics]`` in the run's folder, to go on after ``start_step`` steps."""
    sinks: list[Sink] = [JsonLines(folder / METRICS_FILE)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(folder / TENSORBOARD_FOLDER, start_step))
    if config.metrics.wandb:
        sinks.append(Wandb(config, folder, run_id))
    return sinks


def _flat(record: Record) -> Iterator[tuple[str, float | str]]:
    for name, value in record.items():
        if isinstance(value, dict):
            for number, (key, entry) in enumerate(value.items(), 1):
                if isinstance(entry, str):  # what was written after a prompt
                    yield f"{name}/{number}", key + entry
                else:
                    yield f"{name}/layer_{key}" if key.isdigit() else f"{name}/{key}", entry
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
        """Show a step's record. An output that is closed or full is told to nobody: the run goes on."""
        with contextlib.suppress(OSError, ValueError):
            self._log(record)

    def _log(self, record: Record) -> None:
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
        with contextlib.suppress(OSError, ValueError):
            if self._progress is None:
                print(message, file=self._stream, flush=True)
            else:
                self._progress.console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last live line and give the terminal back."""
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
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
        ("trained_share", "trained {:.0%}"),
        ("padding_share", "padding {:.1%}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("mfu", "MFU {:.1%}"),
        ("peak_memory_gib", "{:.2f} GiB"),
    ):
        if name in record:
            parts.append(form.format(record[name]))
    loads = record.get("expert_load_max_over_mean")
    if loads:
        parts.append(f"load {max(loads.values()):.2f}")
    if drifts := [share for share in record.get("routing_drift", {}).values() if not math.isnan(share)]:
        parts.append(f"drift {max(drifts):.1%}")
    if "forced_router" in record:
        parts.append(f"router {record['forced_router']} (forced)")
    return "  ".join(parts)
