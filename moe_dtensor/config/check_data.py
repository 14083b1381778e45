"""Rules of ``[[data.sources]]``, ``[[stages]]``, ``[eval]`` and of the samples during training. Loads no torch."""

from __future__ import annotations

import math

from moe_dtensor.config.errors import Broken
from moe_dtensor.config.resolve import has_conversations
from moe_dtensor.config.schema import Config, Data, Source
from moe_dtensor.config.stages import tokens_through

CORPORA = ("stdlib", "files", "conversations", "datasets", "tokens", "random")
SMALLEST_SHARE = 1e-5
"""Of the sequences that a source may have: where a turn comes less often, finding one takes too long."""


def data_parts(data: Data) -> list[tuple[str, Data | Source]]:
    """[data] itself and its sources, each with the words that name it."""
    return [("data", data), *((f"data.sources.{source.name}", source) for source in data.sources)]


def check_sources(config: Config) -> Broken:
    """(rule with its values, remedy), for each broken rule."""
    if config.data.packing == "best_fit":
        if not (config.data.document_mask or has_conversations(config)):
            yield (
                "data.packing = best_fit puts documents beside each other that have nothing in common; "
                "data.document_mask = false lets them see each other.",
                "Set data.document_mask = true, or data.packing = concatenate.",
            )
        corpora = {source.corpus for source in config.data.sources} or {config.data.corpus}
        if streamed := sorted(corpora & {"datasets", "random"}):
            yield (
                f"data.packing = best_fit looks at all documents first; corpus = {streamed[0]!r} is read as training "
                "goes.",
                "Set the corpus to files, or write token files first: the verb tokenize.",
            )
    if config.data.sources:
        yield from _together(config)
        for number, source in enumerate(config.data.sources, 1):
            yield from _source(source, number)
        yield from _shares("data.sources", [(s.name, s.weight) for s in config.data.sources], config)
    yield from _stages(config)


def _together(config: Config) -> Broken:
    data = config.data
    for key in ("path", "validation_path"):
        if getattr(data, key):
            yield (
                f"data.{key} = {getattr(data, key)!r} stands beside [[data.sources]].",
                f"Give each source its own {key}, or leave the sources out.",
            )
    names = [source.name for source in data.sources]
    if twice := {name for name in names if names.count(name) > 1}:
        yield f"data.sources has the name {sorted(twice)[0]!r} twice.", "Give each source a name of its own."


def _source(source: Source, number: int) -> Broken:
    where = f"data.sources.{source.name}" if source.name else f"the {number}. of [[data.sources]]"
    if not source.name or "." in source.name:
        yield f"{where} needs a name without a dot; it is {source.name!r}.", 'Write name = "web" into it.'
    if source.corpus not in CORPORA and ":" not in source.corpus:
        yield f'{where}.corpus = "{source.corpus}" is unknown.', f"Choose {', '.join(CORPORA)}, or package.module:Name."
    if source.corpus in ("files", "conversations", "datasets", "tokens") and not source.path:
        yield f"{where} needs a path.", "Set path to where its data is."
    for key in ("weight", "tokens", "epochs"):
        value = getattr(source, key)
        if value < 0 or value == math.inf:
            yield f"{where}.{key} = {value} is no share or number.", f"Set {key} to 0 or more."
    if bool(source.weight) == bool(source.tokens):
        yield (
            f"{where} has weight = {source.weight} and tokens = {source.tokens}.",
            "Give it one of the two, above 0.",
        )


def _shares(key: str, pairs: list[tuple[str, float]], config: Config) -> Broken:
    """Weights that can be met, and tokens that the run has."""
    whole = tokens_through(config, config.training.steps)
    tokens = sum(s.tokens for s in config.data.sources) if key == "data.sources" else 0
    weights = [weight for _, weight in pairs]
    batch = config.training.global_batch_size * config.training.seq_len
    if tokens > whole + batch or (tokens and not any(weights) and tokens < whole - batch):
        yield (
            f"{key}: tokens = {tokens:,} in all; the run has training.steps = {config.training.steps} x "
            f"global_batch_size x seq_len = {whole:,}.",
            "Change training.steps or the tokens, or give one source a weight instead: it takes the rest.",
        )
    least = min((w for w in weights if w > 0), default=1.0)
    if sum(weights) > 0 and least / sum(weights) < SMALLEST_SHARE:
        yield (
            f"{key}: a weight of {least} among {sum(weights)} is a share below {SMALLEST_SHARE}.",
            "Raise it, or leave the source out.",
        )


def _stages(config: Config) -> Broken:
    names = [source.name for source in config.data.sources]
    before = 1
    for number, stage in enumerate(config.stages, 1):
        where = f"stages.{number}"
        if stage.from_step <= before:
            yield (
                f"{where}.from_step = {stage.from_step} must come after step {before}, where what is before it begins.",
                "Give stages in the order of their steps; what holds from step 1 stands in the tables themselves.",
            )
        if stage.from_step > config.training.steps:
            yield (
                f"{where}.from_step = {stage.from_step} is beyond training.steps = {config.training.steps}.",
                "Raise training.steps, or leave the stage out.",
            )
        before = stage.from_step
        for key in ("seq_len", "global_batch_size", "microbatch_size", "lr"):
            if getattr(stage, key) < 0 or getattr(stage, key) == math.inf:
                yield f"{where}.{key} = {getattr(stage, key)} is out of range.", f"Set {key} above 0, or leave it out."
        yield from _batch(config, number)
        if stage.weights:
            unknown = [name for name, _ in stage.weights if name not in names]
            if unknown or any(w < 0 for _, w in stage.weights) or not any(w > 0 for _, w in stage.weights):
                yield (
                    f"{where}.weights = {dict(stage.weights)} must give weights above 0 to some of the sources "
                    f"{', '.join(names) or '(there are none)'}.",
                    "Write weights = {name = number}, with the names of [[data.sources]].",
                )
            yield from _shares(f"{where}.weights", list(stage.weights), config)
            if any(source.tokens for source in config.data.sources):
                yield (
                    f"{where}.weights changes shares, but data.sources gives tokens for the whole run.",
                    "Give all sources weights.",
                )


def _batch(config: Config, number: int) -> Broken:
    """What keep_batch_tokens needs."""
    stage = config.stages[number - 1]
    if not stage.keep_batch_tokens:
        return
    training = config.training
    if stage.global_batch_size or not stage.seq_len:
        yield (
            f"stages.{number}.keep_batch_tokens = true goes with seq_len, and without global_batch_size.",
            "Leave global_batch_size out, and give the new seq_len.",
        )
    elif training.global_batch_size * training.seq_len % stage.seq_len:
        yield (
            f"stages.{number}.keep_batch_tokens = true: a batch of {training.global_batch_size} x {training.seq_len} "
            f"tokens is no whole number of sequences of {stage.seq_len}.",
            "Choose a seq_len that divides it, or set global_batch_size.",
        )


def check_evaluation(config: Config) -> Broken:
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
