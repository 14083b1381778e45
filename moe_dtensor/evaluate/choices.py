"""Multiple choice: of several continuations the likeliest, by the measures that lm-eval has. C choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.evaluate.score import Request, Score
from moe_dtensor.evaluate.text import Encoder

FORM = '{"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER}'
CONTEXT = ("context", "question", "query", "prompt")
ANSWER = ("answer", "label", "gold")


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Which of the choices is right, from 0."""


@dataclass(frozen=True)
class Answered:
    """A question and the log-likelihood of each choice."""

    question: Question
    log_likelihood_C: tuple[float, ...]
    tokens_C: tuple[int, ...]


MEASURES: dict[str, Callable[[str, int], float]] = {
    "acc": lambda text, tokens: 1.0,
    "acc_per_token": lambda text, tokens: tokens,
    "acc_norm": lambda text, tokens: len(text),
    "acc_bytes": lambda text, tokens: len(text.encode()),
}
"""What a choice's log-likelihood is divided by before the highest is taken: nothing, its tokens, its letters, its
bytes. lm-eval's acc_norm counts letters, its acc_bytes bytes; in ASCII they are the same."""


def read_questions(name: str, path: Path) -> list[Question]:
    """The questions of a JSON-lines file.

    Raises:
        ConfigError: the file cannot be read, or a line is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--multiple-choice {name}={path} cannot be read: {error}.", "Give a .jsonl file.") from None
    questions = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise ConfigError(f"--multiple-choice {name}={path} has no line.", f"Write lines of {FORM}.")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}).", f"Write {FORM}.") from None
    record = record if isinstance(record, dict) else {}
    context = next((record[key] for key in CONTEXT if key in record), None)
    choices = record.get("choices")
    answer = next((record[key] for key in ANSWER if key in record), None)
    if not isinstance(context, str):
        raise ConfigError(f"{where} has no context that is a text.", f"Write {FORM}.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ConfigError(f"{where} needs two or more choices, none empty; it has {choices!r}.", f"Write {FORM}.")
    if isinstance(answer, str):  # the text of the right choice, or its number as a text
        answer = choices.index(answer) if answer in choices else int(answer) if answer.isdigit() else None
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: the answer must be the number of a choice, from 0 to {len(choices) - 1}.", f"Write {FORM}."
        )
    return Question(context, tuple(choices), answer)


def prepare_questions(
    questions: Sequence[Question], encoder: Encoder, max_length: int, delimiter: str = " "
) -> list[Request]:
    """A request for each choice of each question, in order. Contexts too long lose their beginning."""
    return [
        pair_request(*encoder.pair(question.context, delimiter + choice), max_length)
        for question in questions
        for choice in question.choices
    ]


def pair_request(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """Score a continuation after at most ``max_length`` inputs.

    Raises:
        ConfigError: it has no token of its own, or more than that.
    """
    if not 0 < len(continuation) <= max_length:
        raise ConfigError(
            f"a continuation of {len(continuation)} tokens; there must be 1 to {max_length} (--max-length).",
            "Shorten it, or raise --max-length.",
        )
    return Request((*context, *continuation)[-(max_length + 1) :], len(continuation))


def answer_questions(
    questions: Sequence[Question], requests: Sequence[Request], scores: Sequence[Score]
) -> list[Answered]:
    """Sort the scores to their questions."""
    answered, place = [], 0
    for question in questions:
        stop = place + len(question.choices)
        answered.append(
            Answered(
                question,
                tuple(s.log_likelihood for s in scores[place:stop]),
                tuple(r.scored for r in requests[place:stop]),
            )
        )
        place = stop
    return answered


def accuracies(answered: Sequence[Answered]) -> dict[str, float]:
    """The share of questions whose right choice comes first, by each of :data:`MEASURES`."""
    return {name: sum(_is_right(a, divide) for a in answered) / len(answered) for name, divide in MEASURES.items()}


def _is_right(answered: Answered, divide: Callable[[str, int], float]) -> bool:
    question = answered.question
    values = [
        ll / divide(text, tokens)
        for ll, text, tokens in zip(answered.log_likelihood_C, question.choices, answered.tokens_C, strict=True)
    ]
    return values.index(max(values)) == question.answer
