"""Rules of ``[eval]`` and of the samples during training. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dtensor.config.schema import Config

Broken = Iterator[tuple[str, str]]


def broken(config: Config) -> Broken:
    """(rule with its values, remedy), for each broken rule."""
    yield from _sets(config)
    yield from _samples(config)


def _sets(config: Config) -> Broken:
    sets, interval = config.eval.sets, config.eval.interval
    names = [one.name for one in sets]
    for number, one in enumerate(sets, 1):
        where = f"eval.sets.{one.name}" if one.name else f"the {number}. of [[eval.sets]]"
        if not one.name or "." in one.name:
            yield f"{where} needs a name without a dot; it is {one.name!r}.", 'Write name = "wiki" into it.'
        if not one.path:
            yield f"{where} needs a path.", "Set path to where its text is."
    if twice := {name for name in names if names.count(name) > 1}:
        yield f"eval.sets has the name {sorted(twice)[0]!r} twice.", "Give each set a name of its own."
    if interval and not sets:
        yield f"eval.interval = {interval}, but there is no set to measure.", "Write [[eval.sets]], or set it to 0."
    if sets and not interval:
        yield (
            "eval.sets are given, but eval.interval = 0: none is ever measured.",
            "Set eval.interval, or leave them out.",
        )


def _samples(config: Config) -> Broken:
    training = config.training
    if not training.sample_prompts:
        return
    if config.mesh.pp > 1:
        yield (
            f"training.sample_prompts with mesh.pp = {config.mesh.pp}: a pipeline continues no text during training.",
            "Leave the prompts out, or set mesh.pp = 1; the verb generate continues them from a checkpoint.",
        )
    if not (training.validation_interval or config.eval.interval):
        yield (
            "training.sample_prompts are continued at each validation, but training.validation_interval = 0.",
            "Set training.validation_interval or eval.interval, or leave the prompts out.",
        )
    if training.sample_tokens >= training.seq_len:
        yield (
            f"training.sample_tokens = {training.sample_tokens} leaves no room for a prompt within training.seq_len = "
            f"{training.seq_len}.",
            f"Set training.sample_tokens below {training.seq_len}.",
        )
