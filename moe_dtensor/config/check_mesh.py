"""Rules about where things run: [mesh] and its axes, where experts live, [pipeline] and its schedules. No torch."""

from __future__ import annotations

from moe_dtensor.config.errors import Broken
from moe_dtensor.config.resolve import (
    INTERLEAVED,
    SPLIT_BACKWARD,
    V_SCHEDULES,
    expert_dp_ranks,
    expert_groups,
    expert_ranks,
    expert_shards,
    microbatches,
    moe_layers,
    num_stages,
    padded_vocab,
    shard_ranks,
    shard_words,
)
from moe_dtensor.config.schema import Config


def check_mesh(as_given: Config, config: Config, world_size: int) -> Broken:
    """How many ranks each axis has, and what the sizes of the model make of that; ``config`` is resolved."""
    yield from _mesh(as_given, world_size)
    yield from _levels(config)
    yield from _tensor_parallel(config)
    yield from _placement(config)
    yield from _attention(config)
    yield from _async_tp(config)
    yield from _cuda_graph(config)
    yield from _data_parallel(config)


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


def _placement(config: Config) -> Broken:
    """What ``mesh.experts`` and ``mesh.dispatch`` ask of the sizes."""
    moe, mesh = config.moe, config.mesh
    if not moe_layers(config):
        return
    ranks = expert_ranks(config)
    yield from _groups(config)
    dp = "mesh.expert_ranks" if mesh.expert_ranks else "mesh.dp" if mesh.dp_replicate == 1 else "mesh.dp / dp_replicate"
    over = {"tp": "mesh.tp", "dp": dp, "dp_tp": f"{dp} * mesh.tp"}.get(mesh.experts)
    if over and moe.num_experts % ranks:
        at = "" if mesh.experts == "tp" else f", over which mesh.experts = {mesh.experts} spreads them"
        yield (
            f"moe.num_experts = {moe.num_experts} is not a multiple of {over} = {ranks}{at}.",
            f"Set {over} to a divisor of {moe.num_experts}, or that to {-(-moe.num_experts // ranks) * ranks}.",
        )
    if mesh.experts == "tp_hidden":
        if moe.hidden_dim % mesh.tp:
            yield (
                f"moe.hidden_dim = {moe.hidden_dim} is not a multiple of mesh.tp = {mesh.tp}, over which "
                "mesh.experts = tp_hidden splits it.",
                f"Set moe.hidden_dim = {-(-moe.hidden_dim // mesh.tp) * mesh.tp}.",
            )
        if mesh.dispatch == "all_to_all":
            yield (
                "mesh.dispatch = all_to_all sends tokens to where their experts are, but with mesh.experts = tp_hidden "
                "each is on every rank.",
                "Set mesh.dispatch = all_gather, or mesh.experts to tp, dp or dp_tp.",
            )
    yield from _lending(config)
    yield from _one_sided(config)
    if moe.expert_bias and mesh.experts == "tp" and moe.hidden_dim % shard_ranks(config):
        yield (
            f"moe.hidden_dim = {moe.hidden_dim} is not a multiple of {shard_words(config)}, along which FSDP cuts the "
            "experts' biases (moe.expert_bias).",
            f"Set mesh.dp to a divisor of {moe.hidden_dim}, or mesh.experts = dp.",
        )
    if mesh.experts in ("dp", "dp_tp") and config.fsdp.cpu_offload:
        yield (
            f"fsdp.cpu_offload = true with mesh.experts = {mesh.experts}, which leaves the experts out of FSDP.",
            "Set fsdp.cpu_offload = false, or mesh.experts to tp or tp_hidden.",
        )


def _one_sided(config: Config) -> Broken:
    """What ``mesh.dispatch = one_sided`` asks."""
    mesh, moe = config.mesh, config.moe
    if mesh.dispatch != "one_sided":
        return
    splits = mesh.pp > 1 and config.pipeline.schedule in SPLIT_BACKWARD
    for wrong, words, remedy in (
        (mesh.experts not in ("tp", "dp"), f"mesh.experts = {mesh.experts}", "mesh.experts to tp or dp"),
        (
            mesh.experts == "tp" and mesh.tp > 1 and not mesh.sequence_parallel,
            "mesh.sequence_parallel = false, under which tp ranks hold the same tokens",
            "mesh.sequence_parallel = true",
        ),
        (moe.expert_bias, "moe.expert_bias = true", "moe.expert_bias = false"),
        (moe.gate_on == "input", "moe.gate_on = input", "moe.gate_on = output"),
        (splits, f"pipeline.schedule = {config.pipeline.schedule}, which splits backward passes", "another schedule"),
    ):
        if wrong:
            yield (
                f"mesh.dispatch = one_sided does not go with {words}.",
                f"Set {remedy}, or mesh.dispatch = all_gather.",
            )


def _lending(config: Config) -> Broken:
    """What ``mesh.lent_experts`` asks."""
    mesh, lent, ranks = config.mesh, config.mesh.lent_experts, expert_ranks(config)
    if not lent:
        return
    for key, value, wrong, right in (
        ("experts", mesh.experts, mesh.experts == "tp_hidden", "tp, dp or dp_tp"),
        ("dispatch", mesh.dispatch, mesh.dispatch != "all_gather", "all_gather"),
    ):
        if wrong:
            why = "whole experts" if key == "experts" else "all choices on every rank"
            yield (
                f"mesh.lent_experts = {lent} needs {why}, but mesh.{key} = {value}.",
                f"Set mesh.{key} to {right}, or mesh.lent_experts = 0.",
            )
    held = config.moe.num_experts // ranks
    if lent > held:
        yield (
            f"mesh.lent_experts = {lent} is above the {held} experts of a rank (moe.num_experts = "
            f"{config.moe.num_experts} over {ranks} ranks).",
            f"Set mesh.lent_experts to at most {held}.",
        )


def _groups(config: Config) -> Broken:
    """What ``mesh.expert_ranks`` and ``mesh.expert_weights`` ask."""
    moe, mesh, ranks = config.moe, config.mesh, expert_dp_ranks(config)
    on_dp = mesh.experts in ("dp", "dp_tp")
    for key, given in (("expert_ranks", mesh.expert_ranks), ("expert_weights", mesh.expert_weights)):
        if given not in (0, "replicated") and not on_dp:
            yield (
                f"mesh.{key} = {given} is about experts on dp ranks, but mesh.experts = {mesh.experts}.",
                f"Set mesh.experts to dp or dp_tp, or take mesh.{key} out.",
            )
            return
    if not on_dp:
        return
    if mesh.dp % ranks:
        yield (
            f"mesh.expert_ranks = {ranks} does not divide mesh.dp = {mesh.dp} into groups.",
            f"Set mesh.expert_ranks to a divisor of {mesh.dp}, or to 0 for one group.",
        )
        return
    if mesh.expert_weights == "sharded" and expert_groups(config) % mesh.dp_replicate:
        yield (
            f"mesh.expert_weights = sharded with mesh.dp_replicate = {mesh.dp_replicate}, which does not divide the "
            f"{expert_groups(config)} groups of mesh.expert_ranks = {ranks}.",
            f"Set mesh.expert_ranks to a divisor of {shard_ranks(config)}, or mesh.expert_weights = replicated.",
        )
    shards = expert_shards(config)
    if moe.expert_bias and moe.hidden_dim % shards:
        yield (
            f"moe.hidden_dim = {moe.hidden_dim} is not a multiple of the {shards} groups across which "
            "mesh.expert_weights = sharded cuts the experts' biases (moe.expert_bias).",
            "Change one of them, or set mesh.expert_weights = replicated.",
        )


def _attention(config: Config) -> Broken:
    """What ``mesh.attention = sequences`` asks."""
    mesh, size = config.mesh, config.training.microbatch_size
    if mesh.attention != "sequences" or mesh.tp == 1:
        return
    if not mesh.sequence_parallel:
        yield (
            "mesh.attention = sequences with mesh.sequence_parallel = false: tp ranks hold the same tokens.",
            "Set mesh.sequence_parallel = true, or mesh.attention = heads.",
        )
    elif size % mesh.tp:
        yield (
            f"mesh.attention = sequences: training.microbatch_size = {size} is not a multiple of mesh.tp = {mesh.tp}.",
            f"Set training.microbatch_size = {-(-size // mesh.tp) * mesh.tp}, or mesh.attention = heads.",
        )


def _async_tp(config: Config) -> Broken:
    if not config.compile.async_tp:
        return
    if config.mesh.attention == "sequences":
        yield (
            "compile.async_tp = true with mesh.attention = sequences: no tokens travel that it could cut.",
            "Set compile.async_tp = false, or mesh.attention = heads.",
        )
    if not config.compile.enable:
        yield "compile.async_tp = true needs compile.enable = true.", "Set both, or neither."
    if not config.mesh.sequence_parallel:
        yield (
            "compile.async_tp = true needs mesh.sequence_parallel = true: it cuts all-gathers and reduce-scatters.",
            "Set mesh.sequence_parallel = true, or compile.async_tp = false.",
        )


def _cuda_graph(config: Config) -> Broken:
    """What a graph cannot hold: work for the host, weights and gradients that move."""
    if not config.compile.cuda_graph:
        return
    moe, fsdp, mesh = config.moe, config.fsdp, config.mesh
    if mesh.pp > 1:
        yield "compile.cuda_graph = true needs mesh.pp = 1.", "Set mesh.pp = 1, or compile.cuda_graph = false."
    if config.compile.async_tp:
        yield (
            "compile.cuda_graph = true with compile.async_tp = true, which copies between ranks on streams of its own.",
            "Set one of them to false.",
        )
    if moe.num_experts and expert_ranks(config) > 1:
        spread = f"and experts spread over {expert_ranks(config)} ranks"
        if mesh.dispatch in ("all_to_all", "auto"):
            yield (
                f"compile.cuda_graph = true with mesh.dispatch = {mesh.dispatch} {spread}: an all-to-all reads its "
                "counts on the host.",
                "Set mesh.dispatch = all_gather or one_sided, with moe.rows = worst.",
            )
        elif moe.rows == "exact":
            yield (
                f"compile.cuda_graph = true with moe.rows = exact {spread}: each layer reads on the host how many rows "
                "have come.",
                "Set moe.rows = worst.",
            )
    if moe.num_experts and moe.backend == "grouped_gemm":
        yield (
            "compile.cuda_graph = true with moe.backend = grouped_gemm, which reads each expert's rows on the host.",
            "Set moe.backend = auto.",
        )
    moving = {
        "fsdp.cpu_offload = true": (fsdp.cpu_offload, "false"),
        "fsdp.reshard_after_forward = always": (fsdp.reshard_after_forward == "always", "never"),
        "fsdp.accumulate = sharded": (fsdp.accumulate == "sharded", "whole"),
    }
    for setting, (found, wanted) in moving.items():
        if found:
            yield (
                f"compile.cuda_graph = true with {setting}: weights and gradients have to stay where they are.",
                f"Set {setting.split(' = ')[0]} = {wanted}.",
            )


def _data_parallel(config: Config) -> Broken:
    model = config.model
    shards, over = shard_ranks(config), shard_words(config)
    if model.dim % shards:
        yield (
            f"model.dim = {model.dim} is not a multiple of {over}, along which FSDP cuts the width of weights.",
            f"Set mesh.dp to a divisor of {model.dim}, or model.dim = {-(-model.dim // shards) * shards}.",
        )


def check_stages_per_rank(config: Config) -> Broken:
    """What the schedule asks of it, of a config that is not resolved."""
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


def check_pipeline(config: Config) -> Broken:
    """What stages and schedules ask of blocks, microbatches and what else is switched on."""
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
