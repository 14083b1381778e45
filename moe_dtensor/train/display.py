"""What rank 0 shows: one live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO

from moe_dtensor.train.sinks import Record

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
