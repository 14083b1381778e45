"""Rules of a config: each broken one is one ConfigError. Loads no torch.

Here are those of single fields, of [training], [optimizer] and [checkpoint], and of names; beside it those of the model
(``check_model``), of meshes and pipelines (``check_mesh``) and of data, stages and evaluation (``check_data``).
"""

from __future__ import annotations

import difflib
import math

from moe_dtensor.config.check_data import CORPORA, check_evaluation, check_sources, data_parts
from moe_dtensor.config.check_mesh import check_mesh, check_pipeline, check_stages_per_rank
from moe_dtensor.config.check_model import (
    check_attention,
    check_experts,
    check_model,
    check_packages,
    check_routing,
)
from moe_dtensor.config.errors import Broken, ConfigError
from moe_dtensor.config.load import is_pythons_own, names_object
from moe_dtensor.config.resolve import (
    FORCED,
    SPLIT_BACKWARD,
    expert_shards,
    fuses_activation,
    microbatches,
    moe_kinds,
    moe_layers,
    resolve,
    state_dtype,
)
from moe_dtensor.config.schema import Config, LrScheduler
from moe_dtensor.config.stages import stage_at
from moe_dtensor.config.tables import all_fields, show

ROUTERS = ("sinkhorn", "topk", "expert_choice", *FORCED)
LOSSES = ("cross_entropy",)
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
AT_LEAST_ONE = (
    *("model.num_layers", "model.dim", "model.num_heads", "moe.top_k", "moe.hidden_dim", "moe.every"),
    *("moe.sinkhorn_iterations", "mesh.pp", "mesh.tp", "mesh.dp_replicate", "training.steps", "training.seq_len"),
    *("training.global_batch_size", "training.microbatch_size", "training.max_skipped", "training.sample_tokens"),
    *("checkpoint.interval", "metrics.log_interval", "profiling.first_step", "profiling.steps", "comm.timeout_seconds"),
)
ABOVE_ZERO = (
    *("model.norm_eps", "model.rope_theta", "model.init_std", "rope.factor", "rope.low", "rope.beta_slow"),
    *("moe.gate_scale", "model.embedding_scale", "model.residual_scale", "model.logit_scale", "mesh.link_bandwidth"),
    *("mesh.device_memory", "optimizer.eps"),
)
FROM_ZERO_TO_ONE = (
    *("data.max_bad_records", "moe.jitter", "optimizer.beta1", "optimizer.beta2", "lr_scheduler.decay_fraction"),
    "lr_scheduler.min_lr_ratio",
)
BY_ITSELF = ("mesh.dp", "training.norm_type")
"""Numbers with a rule of their own. All that are in none of these lists are 0 or more."""


def check(config: Config, world_size: int, *, here: bool = True) -> None:
    """Raise for the first rule that ``config`` breaks on ``world_size`` ranks; resolved or not, it is all the same.

    Args:
        here: whether it is to run in this environment, with its packages; False: it is only reckoned with.

    Raises:
        ConfigError: the rule with its values, and the remedy.
    """
    for problem, remedy in _broken(config, world_size):
        raise ConfigError(problem, remedy)
    for problem, remedy in check_packages(config) if here else ():
        raise ConfigError(problem, remedy)
    for problem, remedy in check_sources(config):
        raise ConfigError(problem, remedy)
    for number, stage in enumerate(config.stages, 1):
        for problem, remedy in _broken(stage_at(resolve(config, world_size), stage.from_step), world_size):
            raise ConfigError(f"In stage {number}, from step {stage.from_step} on: {problem}", remedy)


def _broken(config: Config, world_size: int) -> Broken:
    yield from _ranges(config)
    yield from check_stages_per_rank(config)
    as_given, config = config, resolve(config, world_size)
    yield from _names(config)
    yield from _checkpoint(config)
    yield from check_model(as_given)
    yield from check_attention(config)
    yield from check_experts(config)
    for kind in moe_kinds(config):
        yield from check_routing(kind)
    yield from check_mesh(as_given, config, world_size)
    yield from _batches(config)
    yield from check_pipeline(config)
    yield from _precision(config)
    yield from _drift(config)
    yield from _ends(as_given)
    yield from check_evaluation(config)


def _ranges(config: Config) -> Broken:
    """Fields whose value makes no sense whatever the others say."""
    values = {key: getattr(getattr(config, field.table), field.name) for key, field in all_fields().items()}
    numbers = [key for key, field in all_fields().items() if field.type in (int, float)]
    for key in (key for key in numbers if key not in (*ABOVE_ZERO, *FROM_ZERO_TO_ONE, *BY_ITSELF)):
        least = int(key in AT_LEAST_ONE)
        if values[key] < least:
            yield f"{key} = {show(values[key])} is too small.", f"Set {key} to {least} or more."
    for key in ABOVE_ZERO:
        if values[key] <= 0:
            yield f"{key} = {show(values[key])} must be above 0.", f"The default is {show(all_fields()[key].default)}."
    for key in FROM_ZERO_TO_ONE:
        if not 0 <= values[key] <= 1:
            yield f"{key} = {show(values[key])} lies outside 0 to 1.", f"Give {key} a share from 0 to 1."
    for key, what in (
        ("optimizer.beta1", "would never forget"),
        ("optimizer.beta2", "would never forget"),
        ("moe.jitter", "could hide the router's input altogether"),
    ):
        if values[key] == 1:
            yield f"{key} = 1.0 {what}.", f"Set {key} below 1."
    for key in numbers:
        if values[key] == math.inf and key != "training.norm_type":
            yield f"{key} = inf is not finite.", f"Set {key} to a finite number."
    if values["mesh.dp"] < 1 and values["mesh.dp"] != -1:
        yield f"mesh.dp = {values['mesh.dp']} is no number of ranks.", "Set mesh.dp to 1 or more, or -1 for the rest."
    if values["training.seed"] >= 2**63:
        yield f"training.seed = {values['training.seed']} is too large.", "Set training.seed below 2^63."
    if values["checkpoint.keep_last"] == 1:
        yield (
            "checkpoint.keep_last = 1 would delete the only whole checkpoint while the next is written.",
            "Set checkpoint.keep_last to 2 or more, or 0 to keep all.",
        )
    if values["training.norm_type"] not in (2.0, math.inf):
        yield f"training.norm_type = {values['training.norm_type']} is not supported.", "Set it to 2 or inf."


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


def _precision(config: Config) -> Broken:
    """What is kept, computed and summed in which dtype."""
    yield from _dtypes(config)
    yield from _sums_of_experts(config)
    yield from _float8(config)
    yield from _quack(config)
    yield from _rounding(config)
    if config.optimizer.state_dtype != "auto":
        yield from _moments(config)


def _dtypes(config: Config) -> Broken:
    training, backend = config.training, config.moe.backend
    if training.dtype == "float16":
        yield (
            "training.dtype = float16: updates of master weights are below what it resolves, and squares of gradients "
            "below what it holds.",
            "Set training.dtype to float32, or bfloat16.",
        )
    if training.reduce_dtype == "float16":
        yield (
            f"training.reduce_dtype = float16 holds nothing above 65,504, which gradients computed in "
            f"training.param_dtype = {training.param_dtype} may sum to.",
            "Set training.reduce_dtype to float32, or bfloat16.",
        )
    if training.param_dtype == "float16":
        yield "training.param_dtype = float16 needs loss scaling, which is not here.", "Set it to bfloat16 or float32."
    if BITS[training.param_dtype] > BITS[training.dtype]:
        yield (
            f"training.param_dtype = {training.param_dtype} is wider than the master weights' "
            f"training.dtype = {training.dtype}.",
            f"Set training.dtype = {training.param_dtype}, or lower training.param_dtype.",
        )
    if BITS[training.reduce_dtype] < BITS[training.param_dtype]:
        yield (
            f"training.reduce_dtype = {training.reduce_dtype} is narrower than "
            f"training.param_dtype = {training.param_dtype}: gradients would lose digits when summed.",
            f"Set training.reduce_dtype = {training.param_dtype}.",
        )
    if config.fsdp.accumulate == "sharded" and BITS[training.dtype] < BITS[training.reduce_dtype]:
        yield (
            f"fsdp.accumulate = sharded adds shards up in training.dtype = {training.dtype}, which is narrower than "
            f"training.reduce_dtype = {training.reduce_dtype}.",
            "Set fsdp.accumulate = whole, or training.dtype = float32.",
        )
    if backend in ("grouped_gemm", "quack") and training.param_dtype != "bfloat16":
        yield (
            f"moe.backend = {backend} computes in bfloat16, not training.param_dtype = {training.param_dtype}.",
            "Set moe.backend to auto or reference, or training.param_dtype = bfloat16.",
        )
    if backend in ("torch", "triton") and training.param_dtype == "float64":
        yield (
            f"moe.backend = {backend} has no kernel for training.param_dtype = float64.",
            "Set moe.backend to auto or reference.",
        )


def _float8(config: Config) -> Broken:
    """What experts in float8 cannot be combined with."""
    if config.moe.expert_dtype != "float8" or not config.moe.num_experts:
        return
    if config.moe.backend in ("torch", "grouped_gemm", "quack"):
        yield (
            f"moe.expert_dtype = float8 has no kernel in moe.backend = {config.moe.backend}.",
            "Set moe.backend = auto.",
        )
    if config.moe.expert_bias:
        yield "moe.expert_dtype = float8 does not take moe.expert_bias = true.", "Set moe.expert_dtype = param."
    if config.mesh.experts == "tp_hidden" and config.mesh.tp > 1:
        yield (
            "moe.expert_dtype = float8 scales whole rows of experts, of which mesh.experts = tp_hidden gives each rank "
            "a part.",
            "Set mesh.experts = tp, dp or dp_tp.",
        )
    if config.mesh.dispatch == "one_sided":
        yield (
            "moe.expert_dtype = float8 has no kernels for mesh.dispatch = one_sided.",
            "Set mesh.dispatch = all_gather.",
        )
    if config.mesh.pp > 1 and config.pipeline.schedule in SPLIT_BACKWARD:
        yield (
            f"moe.expert_dtype = float8 with pipeline.schedule = {config.pipeline.schedule}, which splits the backward "
            "pass: the experts are one node.",
            "Set pipeline.schedule to 1F1B, GPipe or Interleaved1F1B.",
        )


def _quack(config: Config) -> Broken:
    if config.moe.backend != "quack" or not config.moe.num_experts:
        return
    if config.moe.keep_rows and fuses_activation(config):
        yield (
            "moe.keep_rows = true with moe.backend = quack, whose products gather tokens themselves: there are no rows "
            "to keep.",
            "Set moe.keep_rows = false.",
        )


def _sums_of_experts(config: Config) -> Broken:
    training, own = config.training, config.mesh.experts in ("dp", "dp_tp") and expert_shards(config) == 1
    if own and microbatches(config) > 1 and BITS[training.dtype] < BITS[training.reduce_dtype]:
        yield (
            f"mesh.experts = {config.mesh.experts} adds gradients of {microbatches(config)} microbatches up "
            f"in training.dtype = {training.dtype}, which is narrower than training.reduce_dtype = "
            f"{training.reduce_dtype}.",
            "Set mesh.experts = tp, or training.dtype = float32.",
        )


def _moments(config: Config) -> Broken:
    # Rounded to nearest, a number of eight binary digits stays as it is where it changes by less than 2^-8 of itself.
    if state_dtype(config) == "bfloat16" and config.optimizer.beta2 > 1 - 2**-8:
        yield (
            f"optimizer.beta2 = {config.optimizer.beta2} with second moments in bfloat16: they would never decay.",
            "Set optimizer.beta2 to 0.996 or less, or optimizer.state_dtype = float32.",
        )


def _rounding(config: Config) -> Broken:
    training, rounding = config.training, config.optimizer.rounding
    if rounding != "nearest" and training.dtype != "bfloat16":
        yield (
            f"optimizer.rounding = {rounding} is for weights in bfloat16, not training.dtype = {training.dtype}.",
            "Set training.dtype = bfloat16, or optimizer.rounding = nearest.",
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
