"""What ``[[stages]]`` make of a config: the settings of each step, and the tokens before it. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from moe_dtensor.config.schema import Config, Stage


@dataclass(frozen=True)
class Span:
    """Steps with the same settings."""

    first: int
    """First step, from 1."""
    last: int
    config: Config
    """With the span's ``[training]``; ``stages`` as given."""
    weights: tuple[float, ...]
    """Of ``data.sources``, in their order; sum 1. Empty without sources."""


def spans(config: Config) -> list[Span]:
    """The spans of a run in order: what comes before the first stage, then each stage up to the run's end."""
    found: list[Span] = []
    firsts = [1, *(stage.from_step for stage in config.stages)]
    lasts = [*(stage.from_step - 1 for stage in config.stages), config.training.steps]
    now, weights = config, source_weights(config)
    for first, last, stage in zip(firsts, lasts, (None, *config.stages), strict=True):
        if stage is not None:
            now = enter(now, stage)
            weights = named_weights(config, stage) if stage.weights else weights
        found.append(Span(first, last, now, weights))
    return found


def span_at(config: Config, step: int) -> Span:
    """The span that a step (from 1) belongs to."""
    return [span for span in spans(config) if span.first <= max(step, 1)][-1]


def stage_at(config: Config, step: int) -> Config:
    """The config with the settings of a step."""
    return span_at(config, step).config if config.stages else config


def enter(config: Config, stage: Stage) -> Config:
    """``config`` with a stage's sizes; those that followed from others go on following them."""
    old = config.training
    seq_len = stage.seq_len or old.seq_len
    batch = stage.global_batch_size or old.global_batch_size
    if stage.keep_batch_tokens:
        batch = max(1, old.global_batch_size * old.seq_len // seq_len)
    microbatch = stage.microbatch_size or old.microbatch_size
    follows = old.validation_sequences == old.global_batch_size
    training = replace(
        old,
        seq_len=seq_len,
        global_batch_size=batch,
        microbatch_size=microbatch,
        validation_sequences=batch if follows else old.validation_sequences,
    )
    group = config.moe.group_sequences
    moe = replace(config.moe, group_sequences=microbatch if group == old.microbatch_size else group)
    return replace(config, training=training, moe=moe)


def peak_lr(config: Config, step: int) -> float:
    """The peak learning rate that holds at a step."""
    given = [stage.lr for stage in config.stages if stage.from_step <= step and stage.lr]
    return given[-1] if given else config.optimizer.lr


def sequences_before(config: Config, step: int) -> int:
    """Sequences of all steps before ``step``."""
    return sum(
        (min(span.last, step - 1) - span.first + 1) * span.config.training.global_batch_size
        for span in spans(config)
        if span.first < step
    )


def tokens_through(config: Config, step: int) -> int:
    """Tokens of all steps up to ``step``, which included; beyond the run's end the last settings go on."""
    total = 0
    found = spans(config)
    for span in found:
        last = step if span is found[-1] else min(span.last, step)
        training = span.config.training
        total += max(0, last - span.first + 1) * training.global_batch_size * training.seq_len
    return total


def source_weights(config: Config) -> tuple[float, ...]:
    """Shares of ``data.sources`` before any stage: those with ``tokens`` first, the rest by weight; sum 1."""
    sources = config.data.sources
    if not sources:
        return ()
    whole = Fraction(
        max(1, tokens_through(replace(config, data=replace(config.data, sources=())), config.training.steps))
    )
    by_tokens = [Fraction(s.tokens) / whole for s in sources]
    rest, weights = max(Fraction(0), 1 - sum(by_tokens)), [Fraction(str(s.weight)) for s in sources]
    if not any(by_tokens):
        return tuple(s.weight for s in sources)
    scale = rest / sum(weights) if sum(weights) else Fraction(0)
    return tuple(float(t) if t else float(w * scale) for t, w in zip(by_tokens, weights, strict=True))


def named_weights(config: Config, stage: Stage) -> tuple[float, ...]:
    """A stage's weights in the order of ``data.sources``."""
    given = dict(stage.weights)
    return tuple(given.get(source.name, 0.0) for source in config.data.sources)
