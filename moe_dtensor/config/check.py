"""Rules that span fields and tables: each broken one is one ConfigError. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from moe_dtensor.config.check_data import CORPORA, check_evaluation, check_sources, data_parts
from moe_dtensor.config.check_model import check_attention, check_experts, check_placement, check_routing
from moe_dtensor.config.check_precision import check_precision
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.objects import is_pythons_own, names_object
from moe_dtensor.config.ranges import out_of_range
from moe_dtensor.config.resolve import (
    FORCED,
    INTERLEAVED,
    SPLIT_BACKWARD,
    V_SCHEDULES,
    microbatches,
    moe_kinds,
    moe_layers,
    num_stages,
    padded_vocab,
    resolve,
    shard_ranks,
    shard_words,
)
from moe_dtensor.config.schema import Config, LrScheduler
from moe_dtensor.config.stages import stage_at

Broken = Iterator[tuple[str, str]]
"""(rule with its values, remedy), for each broken rule."""

ROUTERS = ("sinkhorn", "topk", "expert_choice", *FORCED)
LOSSES = ("cross_entropy",)


def check(config: Config, world_size: int) -> None:
    """Raise for the first rule that ``config`` breaks on ``world_size`` ranks; resolved or not, it is all the same.

    Raises:
        ConfigError: the rule with its values, and the remedy.
    """
    for problem, remedy in _broken(config, world_size):
        raise ConfigError(problem, remedy)
    for problem, remedy in check_sources(config):
        raise ConfigError(problem, remedy)
    for number, stage in enumerate(config.stages, 1):
        for problem, remedy in _broken(stage_at(resolve(config, world_size), stage.from_step), world_size):
            raise ConfigError(f"In stage {number}, from step {stage.from_step} on: {problem}", remedy)


def _broken(config: Config, world_size: int) -> Broken:
    yield from out_of_range(config)
    yield from _stages_per_rank(config)
    config_as_given, config = config, resolve(config, world_size)
    yield from _names(config)
    yield from _checkpoint(config)
    yield from _model(config_as_given)
    yield from check_attention(config)
    yield from check_experts(config)
    for kind in moe_kinds(config):
        yield from check_routing(kind)
    yield from _mesh(config_as_given, world_size)
    yield from _levels(config)
    yield from _tensor_parallel(config)
    yield from check_placement(config)
    yield from _async_tp(config)
    yield from _data_parallel(config)
    yield from _batches(config)
    yield from _pipeline(config)
    yield from check_precision(config)
    yield from _drift(config)
    yield from _ends(config_as_given)
    yield from check_evaluation(config)


def _names(config: Config) -> Broken:
    for key, name, known in (
        *(("moe.router", name, ROUTERS) for name in (config.moe.router, *config.moe.router_by_layer)),
        ("data.corpus", config.data.corpus, CORPORA),
        ("training.loss", config.training.loss, LOSSES),
    ):
        if name in known:
            continue
        if names_object(name) and is_pythons_own(name):
            yield f'{key} = "{name}" names a part of Python itself.', "Name a class or function of your own."
        elif not names_object(name):
            near = difflib.get_close_matches(name, known, n=1)
            guess = f'Did you mean "{near[0]}"? ' if near else ""
            yield f'{key} = "{name}" is unknown.', f"{guess}Choose {', '.join(known)}, or your own package.module:Name."
    if config.data.corpus in ("files", "conversations", "datasets", "tokens") and not (
        config.data.path or config.data.sources
    ):
        yield f'data.corpus = "{config.data.corpus}" needs data.path.', "Set data.path to where the text is."


def _checkpoint(config: Config) -> Broken:
    if config.checkpoint.export_hf and not config.checkpoint.enable:
        yield (
            "checkpoint.export_hf = true writes what the last checkpoint holds, but checkpoint.enable = false.",
            "Set both, or take checkpoint.export_hf out.",
        )


def _model(config: Config) -> Broken:
    model = config.model
    if model.head_dim == 0 and not model.kv_rank and model.dim % model.num_heads:
        yield (
            f"model.dim = {model.dim} is not a multiple of model.num_heads = {model.num_heads}.",
            "Change one of them, or set model.head_dim.",
        )
    if model.norm_bias and model.norm != "layernorm":
        yield (
            f"model.norm_bias = true with model.norm = {model.norm}, which has no bias.",
            "Set model.norm = layernorm, or take model.norm_bias out.",
        )
    if model.head_bias and model.tie_embeddings:
        yield (
            "model.head_bias = true with model.tie_embeddings = true: the embedding is the head, and has no bias.",
            "Take one of them out.",
        )


def _mesh(config: Config, world_size: int) -> Broken:
    mesh = config.mesh
    if world_size < 1:
        yield f"there are {world_size} ranks.", "Start 1 or more."
    elif mesh.dp == -1:
        if world_size % (mesh.pp * mesh.tp):
            inner = mesh.pp * mesh.tp
            yield (
                f"[mesh] needs a multiple of pp={mesh.pp} x tp={mesh.tp} = {inner} ranks, but there are {world_size}.",
                f"Start {-(-world_size // inner) * inner} ranks, or change mesh.pp or mesh.tp.",
            )
    elif world_size != mesh.dp * mesh.pp * mesh.tp:
        ranks = mesh.dp * mesh.pp * mesh.tp
        fits = world_size % (mesh.pp * mesh.tp) == 0
        yield (
            f"[mesh] needs dp={mesh.dp} x pp={mesh.pp} x tp={mesh.tp} = {ranks} ranks, but there are {world_size}.",
            f"Start {ranks} ranks, or {'set mesh.dp = -1' if fits else 'change mesh.pp or mesh.tp'}.",
        )


def _levels(config: Config) -> Broken:
    dp, copies = config.mesh.dp, config.mesh.dp_replicate
    if dp % copies:
        yield (
            f"mesh.dp_replicate = {copies} does not divide mesh.dp = {dp} into groups.",
            f"Set mesh.dp_replicate to a divisor of {dp}.",
        )


def _tensor_parallel(config: Config) -> Broken:
    model, moe, tp = config.model, config.moe, config.mesh.tp
    kv_heads = model.num_kv_heads
    has_dense = len(moe_layers(config)) < model.num_layers
    for key, value, matters in (
        ("model.num_heads", model.num_heads, True),
        ("training.seq_len", config.training.seq_len, config.mesh.sequence_parallel),
        ("model.hidden_dim", model.hidden_dim, has_dense),
        ("moe.shared_hidden_dim, or moe.num_shared_experts * moe.hidden_dim", moe.shared_hidden_dim, True),
        ("model.vocab_size, padded to a multiple of 64,", padded_vocab(config), True),
    ):
        if matters and value % tp:
            more = ", or mesh.sequence_parallel = false" if key == "training.seq_len" else ""
            yield (
                f"{key} = {value} is not a multiple of mesh.tp = {tp}.",
                f"Set mesh.tp to a divisor of {value}, or that to {-(-value // tp) * tp}{more}.",
            )
    if kv_heads % tp and tp % kv_heads:
        yield (
            f"model.num_kv_heads = {kv_heads} and mesh.tp = {tp}: neither divides the other.",
            "Key/value heads are split over tp or repeated on it: make one a multiple of the other.",
        )


def _async_tp(config: Config) -> Broken:
    if not config.compile.async_tp:
        return
    if not config.compile.enable:
        yield "compile.async_tp = true needs compile.enable = true.", "Set both, or neither."
    if not config.mesh.sequence_parallel:
        yield (
            "compile.async_tp = true needs mesh.sequence_parallel = true: it cuts all-gathers and reduce-scatters.",
            "Set mesh.sequence_parallel = true, or compile.async_tp = false.",
        )


def _data_parallel(config: Config) -> Broken:
    model = config.model
    shards, over = shard_ranks(config), shard_words(config)
    if model.dim % shards:
        yield (
            f"model.dim = {model.dim} is not a multiple of {over}, along which FSDP cuts the width of weights.",
            f"Set mesh.dp to a divisor of {model.dim}, or model.dim = {-(-model.dim // shards) * shards}.",
        )


def _batches(config: Config) -> Broken:
    training, dp = config.training, config.mesh.dp
    size, each = training.global_batch_size, dp * training.microbatch_size
    if size % each:
        yield (
            f"training.global_batch_size = {size} is not a multiple of mesh.dp = {dp} x "
            f"training.microbatch_size = {training.microbatch_size} = {each}.",
            f"Set training.global_batch_size = {-(-size // each) * each}, or change the other two.",
        )
    if config.model.mtp_depth >= training.seq_len:
        yield (
            f"model.mtp_depth = {config.model.mtp_depth} looks beyond training.seq_len = {training.seq_len}.",
            f"Set model.mtp_depth below {training.seq_len}.",
        )
    if training.validation_interval and training.validation_sequences % size:
        yield (
            f"training.validation_sequences = {training.validation_sequences} is not a multiple of "
            f"training.global_batch_size = {size}.",
            f"Set training.validation_sequences = {-(-training.validation_sequences // size) * size}.",
        )


def _stages_per_rank(config: Config) -> Broken:
    schedule, given = config.pipeline.schedule, config.pipeline.stages_per_rank
    if config.mesh.pp == 1 or given == 0:
        return
    if schedule in INTERLEAVED:
        if given < 2:
            yield (
                f"pipeline.schedule = {schedule} wants several stages on a rank, not {given}.",
                "Set pipeline.stages_per_rank to 2 or more.",
            )
    elif given != (fixed := 2 if schedule in V_SCHEDULES else 1):
        yield (
            f"pipeline.stages_per_rank = {given}, but pipeline.schedule = {schedule} has {fixed} on a rank.",
            "Set pipeline.stages_per_rank = 0.",
        )


def _pipeline(config: Config) -> Broken:
    pp, schedule, layers = config.mesh.pp, config.pipeline.schedule, config.model.num_layers
    if pp == 1:
        return
    stages, count = num_stages(config), microbatches(config)
    if layers < stages:
        yield (
            f"model.num_layers = {layers} is below the {stages} stages of mesh.pp = {pp} under {schedule}.",
            f"Set model.num_layers to {stages} or more, or lower mesh.pp or pipeline.stages_per_rank.",
        )
    if config.model.tie_embeddings:
        yield (
            f"model.tie_embeddings = true with mesh.pp = {pp}: embedding and head are on different ranks.",
            "Set model.tie_embeddings = false, or mesh.pp = 1.",
        )
    if config.compile.enable and schedule in SPLIT_BACKWARD:
        yield (
            f"compile.enable = true with pipeline.schedule = {schedule}, which splits the backward pass: "
            "a compiled block would run the whole of it twice.",
            "Set compile.enable = false, or pipeline.schedule to 1F1B, GPipe or Interleaved1F1B.",
        )
    if config.activation_checkpoint.mode == "selective" and schedule in SPLIT_BACKWARD:
        yield (
            f"activation_checkpoint.mode = selective with pipeline.schedule = {schedule}, which splits the backward "
            "pass: what selective recomputation keeps is given up after its first half.",
            "Set activation_checkpoint.mode to full or none, or pipeline.schedule to 1F1B, GPipe or Interleaved1F1B.",
        )
    if config.fsdp.reshard_after_forward == "always":
        yield (
            f"fsdp.reshard_after_forward = always with mesh.pp = {pp} loses gradients between microbatches.",
            "Set fsdp.reshard_after_forward to auto or never.",
        )
    yield from _schedule(schedule, pp, stages, count)


def _schedule(schedule: str, pp: int, stages: int, count: int) -> Broken:
    """What torch.distributed.pipelining asks of the number of microbatches."""
    change = "change training.global_batch_size or training.microbatch_size"
    given = f"A dp rank runs {count} microbatches (global_batch_size / (dp * microbatch_size)), but"
    if schedule in ("1F1B", "DualPipeV") and count < stages:
        yield (
            f"{given} pipeline.schedule = {schedule} needs one for each of {stages} stages.",
            f"To have {stages} or more, {change}.",
        )
    rounds = max(1, count // pp)
    if schedule in INTERLEAVED and count % rounds:
        yield (
            f"{given} pipeline.schedule = {schedule} goes in rounds of mesh.pp = {pp}.",
            f"To have a multiple of {pp}, {change}.",
        )


def _drift(config: Config) -> Broken:
    interval = config.training.routing_drift_interval
    if interval and not moe_layers(config):
        yield (
            f"training.routing_drift_interval = {interval}, but no block has experts.",
            "Set training.routing_drift_interval = 0.",
        )
    sizes = ("seq_len", "global_batch_size", "microbatch_size", "keep_batch_tokens")
    if interval and any(getattr(stage, key) for stage in config.stages for key in sizes):
        yield (
            f"training.routing_drift_interval = {interval} compares one batch through the whole run, but a stage "
            "changes its size.",
            "Set training.routing_drift_interval = 0, or keep the sizes.",
        )


def _ends(config: Config) -> Broken:
    """What would begin after the run's end, or be read by nobody."""
    steps, warmup, profiling = config.training.steps, config.lr_scheduler.warmup_steps, config.profiling
    # The default may outlast a short trial run.
    if warmup > steps and warmup != LrScheduler().warmup_steps:
        yield (
            f"lr_scheduler.warmup_steps = {warmup} is above training.steps = {steps}: the peak is never reached.",
            f"Set lr_scheduler.warmup_steps to {steps} or less.",
        )
    if profiling.enable and profiling.first_step > steps:
        yield (
            f"profiling.first_step = {profiling.first_step} is above training.steps = {steps}: nothing is recorded.",
            f"Set profiling.first_step to {steps} or less.",
        )
    data = config.data
    for where, part in data_parts(data):
        if part.revision and (part.corpus != "datasets" or (where == "data" and data.sources)):
            yield (
                f'{where}.revision = "{part.revision}" is for a name on the hub, but {where}.corpus = "{part.corpus}".',
                f"Leave {where}.revision empty.",
            )
    for key in ("path", "validation_path"):
        if data.corpus in ("stdlib", "random") and getattr(data, key):
            yield (
                f'data.{key} = "{getattr(data, key)}", but data.corpus = "{data.corpus}" reads no path.',
                f"Set data.corpus to files, conversations, datasets or tokens, or leave data.{key} empty.",
            )
