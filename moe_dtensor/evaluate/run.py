"""All that one evaluation asks for, prepared and checked before a weight is read, then measured together and told."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dtensor.config.command_line import write_json
from moe_dtensor.evaluate import choices, harness
from moe_dtensor.evaluate.choices import Question
from moe_dtensor.evaluate.score import Done, Request, score
from moe_dtensor.evaluate.text import Encoder, Text, TextResult, prepare_text, read_text, sum_text
from moe_dtensor.generate.batch import Model
from moe_dtensor.generate.load import Source, load_tokenizer, tokenizer_folder


@dataclass(frozen=True)
class Wanted:
    """What to measure, by name."""

    data: Mapping[str, str]
    """Files, folders or globs of text."""
    multiple_choice: Mapping[str, Path]
    lm_eval: Sequence[str]
    """Names of tasks."""
    lm_eval_tasks: Path | None
    """A folder of task files."""
    batch_size: int
    limit: int | None
    """Questions of each task of lm-eval; None: all."""
    num_fewshot: int | None
    """Examples before each question of a task of lm-eval; None: as the task says."""


@dataclass(frozen=True)
class Prepared:
    """Requests, and what is needed to read their scores."""

    encoder: Encoder
    max_length: int
    stride: int
    texts: dict[str, Text]
    questions: dict[str, list[Question]]
    asked: dict[str, list[Request]]
    tasks: Any
    """lm-eval's task manager; None without tasks."""


@dataclass
class Report:
    """What was found of one model: a table for the terminal, and a JSON file."""

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


def prepare(wanted: Wanted, source: Source, max_length: int, stride: int) -> Prepared:
    """Read all files; the same on every rank.

    Raises:
        ConfigError: whatever is wrong with them.
    """
    questions = {name: choices.read_questions(name, path) for name, path in wanted.multiple_choice.items()}
    tasks = None
    if wanted.lm_eval:
        harness.check_installed()
        tasks = harness.find_tasks(wanted.lm_eval, wanted.lm_eval_tasks)
    tokenizer, _ = load_tokenizer(source)
    encoder, data = Encoder(tokenizer, tokenizer_folder(source)), source.config.data
    texts = {
        name: prepare_text(
            read_text(f"--data {name}", path, data.text_key, data.max_bad_records), encoder, max_length, stride
        )
        for name, path in wanted.data.items()
    }
    asked = {name: choices.prepare_questions(q, encoder, max_length) for name, q in questions.items()}
    return Prepared(encoder, max_length, stride, texts, questions, asked, tasks)


def measure(model: Model, wanted: Wanted, prepared: Prepared, checkpoint: str, is_rank_0: bool) -> Report:
    """Score everything. Called by all ranks together; lm-eval's part of the report is rank 0's."""
    mesh = model.config.mesh
    dtype = model.config.training.param_dtype
    report = Report(checkpoint, f"{mesh.dp}x1x{mesh.tp}", dtype, prepared.max_length, prepared.stride)
    requests = [
        *(request for text in prepared.texts.values() for request in text.requests),
        *(request for asked in prepared.asked.values() for request in asked),
    ]
    with _progress(len(requests), is_rank_0) as done:
        scores = iter(score(model, requests, wanted.batch_size, done))
    for name, text in prepared.texts.items():
        report.data[name] = text_entry(sum_text(text, [next(scores) for _ in text.requests]))
    for name, asked in prepared.asked.items():
        answered = choices.answer_questions(prepared.questions[name], asked, [next(scores) for _ in asked])
        report.multiple_choice[name] = {"questions": len(answered), **choices.accuracies(answered)}
    if wanted.lm_eval:
        report.lm_eval = harness.run_tasks(
            model,
            prepared.encoder,
            wanted.lm_eval,
            prepared.tasks,
            max_length=prepared.max_length,
            batch_size=wanted.batch_size,
            limit=wanted.limit,
            num_fewshot=wanted.num_fewshot,
        )
    return report


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Done | None]:
    """A bar on a terminal."""
    if not shown or not total or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda count: bar.advance(task, count)


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
