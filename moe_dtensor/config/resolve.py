"""Fill in what a config leaves to be derived, for the whole model and for attention in one block. Loads no torch.

After :func:`resolve` no field means "derive me": every later room reads plain values.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, sqrt
from typing import Literal, NamedTuple

from moe_dtensor.config.load import names_object
from moe_dtensor.config.schema import Config

GATED = ("swiglu", "geglu", "swiglu_clamped")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
FUSED = ("swiglu", "silu", "relu2")
"""Activations that products of ``moe.backend = quack`` compute by themselves."""
WIDE = 2048
"""For experts of this hidden width and more ``moe.backend = quack`` writes rows of tokens once, and every product reads
them; for narrower ones each product gathers tokens while it loads them, which makes it some 10 % slower."""
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
FORCED = ("hash", "uniform", "zipf")
"""Routers that look at no logits."""
INTERLEAVED = ("Interleaved1F1B", "InterleavedZeroBubble")


def resolve(config: Config, world_size: int) -> Config:
    """Return ``config`` with every derived field filled in for ``world_size`` ranks.

    Does not check: run :func:`moe_dtensor.config.check.check` on the result. ``model.vocab_size``
    and ``run.folder`` stay as they are: they need the tokenizer and the TOML's name.
    """
    model, moe, mesh, training = config.model, config.moe, config.mesh, config.training
    gated = model.activation in GATED
    hidden = model.hidden_dim or (-(-8 * model.dim // 3 // 64) * 64 if gated else 4 * model.dim)
    latent = model.nope_dim + model.rope_dim if model.kv_rank else 0
    head_dim = latent or model.head_dim or model.dim // max(1, model.num_heads)
    dp = mesh.dp if mesh.dp != -1 else max(1, world_size // max(1, mesh.pp * mesh.tp))
    reshard = config.fsdp.reshard_after_forward
    if reshard == "auto":
        gives_back = mesh.pp == 1 and (dp > 1 or config.fsdp.cpu_offload) and not config.compile.cuda_graph
        reshard = "always" if gives_back else "never"
    return replace(
        config,
        model=replace(
            model,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            head_dim=head_dim,
            rotary_dim=model.rope_dim if model.kv_rank else model.rotary_dim or head_dim,
            attention_scale=model.attention_scale or 1 / sqrt(max(1, head_dim)),
            hidden_dim=hidden,
        ),
        moe=replace(
            moe,
            group_sequences=moe.group_sequences or training.microbatch_size,
            top_k=max(moe.top_k_by_layer, default=moe.top_k),
            router=next(iter(moe.router_by_layer), moe.router),
            score=moe.score if moe.score != "auto" else _score(config),
            selection_bias=moe.selection_bias or moe.bias_rate > 0,
            shared_hidden_dim=moe.shared_hidden_dim or moe.num_shared_experts * moe.hidden_dim,
        ),
        mesh=replace(mesh, dp=dp),
        pipeline=replace(config.pipeline, stages_per_rank=stages_per_rank(config)),
        fsdp=replace(config.fsdp, reshard_after_forward=reshard),
        data=replace(config.data, document_mask=config.data.document_mask or has_conversations(config)),
        training=replace(training, validation_sequences=training.validation_sequences or training.global_batch_size),
    )


def own_routers(config: Config) -> list[str]:
    """Those that are named ``package.module:Name``."""
    return [name for name in (config.moe.router, *config.moe.router_by_layer) if names_object(name)]


def has_conversations(config: Config) -> bool:
    """Whether the run reads conversations, be it as one of several sources."""
    return "conversations" in {config.data.corpus, *(source.corpus for source in config.data.sources)}


def _score(config: Config) -> Literal["softmax", "sigmoid"]:
    moe = config.moe
    router, top_k = next(iter(moe.router_by_layer), moe.router), max(moe.top_k_by_layer, default=moe.top_k)
    return "sigmoid" if router == "sinkhorn" and top_k == 1 else "softmax"


def stages_per_rank(config: Config) -> int:
    """Pipeline stages that one pp rank holds under the configured schedule."""
    schedule = config.pipeline.schedule
    if config.mesh.pp == 1:
        return 1
    if schedule in V_SCHEDULES:
        return 2
    if schedule in INTERLEAVED:
        return config.pipeline.stages_per_rank or 2
    return 1


def num_stages(config: Config) -> int:
    """Pipeline stages of the whole model."""
    return config.mesh.pp * stages_per_rank(config)


def stage_layers(config: Config, stage: int) -> range:
    """Indices of the blocks of one stage: as even as can be, the first stages take the remainder, the last those of
    multi-token prediction, which are numbered on."""
    each, more = divmod(config.model.num_layers, num_stages(config))
    start = stage * each + min(stage, more)
    ahead = config.model.mtp_depth if stage == num_stages(config) - 1 else 0
    return range(start, start + each + (stage < more) + ahead)


def rank_stages(config: Config, pp_rank: int) -> tuple[int, ...]:
    """Stages on a pp rank: V schedules pair stage i with stage 2·pp-1-i, others go round."""
    pp = config.mesh.pp
    if pp > 1 and config.pipeline.schedule in V_SCHEDULES:
        return (pp_rank, 2 * pp - 1 - pp_rank)
    return tuple(range(pp_rank, num_stages(config), pp))


def moe_layers(config: Config) -> frozenset[int]:
    """Indices of the blocks that have experts; the others have a dense feed-forward."""
    moe, layers = config.moe, config.model.num_layers
    if moe.num_experts == 0:
        return frozenset()
    chosen = frozenset(moe.layers) or frozenset(i for i in range(layers) if (i + 1) % moe.every == 0)
    # Blocks of multi-token prediction are like the last.
    return chosen | frozenset(range(layers, layers + config.model.mtp_depth) if layers - 1 in chosen else ())


def block_config(config: Config, layer: int) -> Config:
    """The config with ``moe.top_k`` and ``moe.router`` of block ``layer``; blocks of multi-token prediction are like
    the last."""
    moe = config.moe
    if not (moe.top_k_by_layer or moe.router_by_layer):
        return config
    at = min(layer, config.model.num_layers - 1)
    top_k, router = moe.top_k_by_layer or (moe.top_k,), moe.router_by_layer or (moe.router,)
    own = replace(moe, top_k=top_k[at % len(top_k)], router=router[at % len(router)])
    return replace(config, moe=replace(own, top_k_by_layer=(), router_by_layer=()))


def moe_kinds(config: Config) -> list[Config]:
    """:func:`block_config` of the MoE blocks, one for all alike, in the order of the first."""
    return list({block.moe: block for i in sorted(moe_layers(config)) for block in [block_config(config, i)]}.values())


def stream_width(config: Config) -> int:
    """Columns of what goes from stage to stage: the stream, and the embeddings that multi-token prediction reads."""
    return config.model.dim * (1 + config.model.mtp_depth)


def block_norms(config: Config) -> tuple[str, ...]:
    """Names of a block's norms, by where they stand."""
    pre, post = ("attention_norm", "ffn_norm"), ("attention_post_norm", "ffn_post_norm")
    return {"pre": pre, "post": post, "both": pre + post}[config.model.norm_at]


def state_dtype(config: Config) -> str:
    """dtype of the optimizer's moments."""
    wanted = config.optimizer.state_dtype
    return config.training.dtype if wanted == "auto" else wanted


def shard_ranks(config: Config) -> int:
    """dp ranks over which FSDP shards: all, or those of a group under ``mesh.dp_replicate``."""
    return max(1, config.mesh.dp // config.mesh.dp_replicate)


def shard_words(config: Config) -> str:
    """How an error calls :func:`shard_ranks`."""
    mesh = config.mesh
    one = mesh.dp_replicate == 1
    return f"mesh.dp = {mesh.dp}" if one else f"mesh.dp / mesh.dp_replicate = {shard_ranks(config)}"


def expert_dp_ranks(config: Config) -> int:
    """dp ranks that share whole experts; 1 where dp shares none."""
    mesh = config.mesh
    return (mesh.expert_ranks or shard_ranks(config)) if mesh.experts in ("dp", "dp_tp") else 1


def expert_ranks(config: Config) -> int:
    """Over how many ranks whole experts are spread; 1 where each rank has a slice of all."""
    mesh, over_dp = config.mesh, expert_dp_ranks(config)
    return {"tp": mesh.tp, "dp": over_dp, "dp_tp": over_dp * mesh.tp, "tp_hidden": 1}[mesh.experts]


def lent_experts(config: Config) -> int:
    """Experts that each rank lends to those that share experts with it; 0 where it is alone."""
    return config.mesh.lent_experts if expert_ranks(config) > 1 else 0


def expert_groups(config: Config) -> int:
    """Groups of dp ranks that hold the same experts (``mesh.expert_ranks``); 1 where experts are not on dp."""
    return config.mesh.dp // expert_dp_ranks(config) if config.mesh.experts in ("dp", "dp_tp") else 1


def expert_shards(config: Config) -> int:
    """Groups across which FSDP shards the experts' weights; 1: it leaves experts on dp alone."""
    sharded = config.mesh.expert_weights == "sharded"
    return max(1, expert_groups(config) // config.mesh.dp_replicate) if sharded else 1


def expert_takes(config: Config) -> int | None:
    """Copies of a routing group that an expert takes at most; None: all."""
    moe = config.moe
    size = moe.group_sequences * config.training.seq_len
    if moe.router == "expert_choice":
        return min(size, -(-size * moe.top_k // moe.num_experts))
    if moe.capacity_factor == 0:
        return None
    # As a decimal: in binary 1.1 times 400 is above 440.
    return ceil(Fraction(str(moe.capacity_factor)) * size * moe.top_k / moe.num_experts)


def padded_vocab(config: Config) -> int:
    """Rows of embedding and head: the vocabulary rounded up to a multiple of 64, whatever tp."""
    return -(-config.model.vocab_size // 64) * 64


def microbatches(config: Config) -> int:
    """Microbatches that one dp rank runs in a step."""
    training = config.training
    return training.global_batch_size // (config.mesh.dp * training.microbatch_size)


class Widths(NamedTuple):
    """Of one head."""

    query: int
    """Of a query or key."""
    value: int
    rotated: int
    """How much of a query or key is rotated: of latent attention the last dimensions, else the first."""


def is_latent(config: Config) -> bool:
    """Whether keys and values are made of a latent (MLA)."""
    return config.model.kv_rank > 0


def head_widths(config: Config) -> Widths:
    """Of a resolved config."""
    model = config.model
    if is_latent(config):
        return Widths(model.head_dim, model.v_dim, model.rope_dim)
    return Widths(model.head_dim, model.head_dim, model.rotary_dim)


def block_window(config: Config, layer: int) -> int:
    """Positions that a query of block ``layer`` sees, its own included; 0: all before it."""
    pattern = config.model.window_layers
    return config.model.window if not pattern or pattern[layer % len(pattern)] == "window" else 0


def block_rotates(config: Config, layer: int) -> bool:
    """Whether block ``layer`` rotates queries and keys."""
    pattern = config.model.rope_layers
    return not pattern or pattern[layer % len(pattern)] == "rope"


def sees_more_than_causal(config: Config, layer: int) -> bool:
    """Whether attention in block ``layer`` is anything but plainly causal: documents, a window, sinks."""
    window = block_window(config, layer)
    return config.data.document_mask or config.model.sinks or 0 < window < config.training.seq_len


def fuses_activation(config: Config) -> bool:
    """Whether experts run as the fused products of ``moe.backend = quack``, and not as its plain ones."""
    splits = config.mesh.pp > 1 and config.pipeline.schedule in SPLIT_BACKWARD
    fusible = config.model.activation in FUSED and not config.moe.expert_bias and not splits
    return config.moe.backend == "quack" and fusible


def tp_axis(config: Config) -> int | None:
    """What tp splits of a microbatch ``(B, S)`` between layers: 0, whole sequences, if it divides their number; 1, the
    positions of each; None, nothing."""
    if config.mesh.tp == 1 or not config.mesh.sequence_parallel:
        return None
    return 1 if config.training.microbatch_size % config.mesh.tp else 0


def attends_by_sequence(config: Config) -> bool:
    """Whether tp ranks attend over sequences of their own, with all heads."""
    return config.mesh.attention == "sequences" and tp_axis(config) == 0


def routes_by_sequence(config: Config) -> bool:
    """Whether every routing group lies on one tp rank, so that ranks choose for their own sequences alone."""
    training, mesh = config.training, config.mesh
    return tp_axis(config) == 0 and training.microbatch_size // mesh.tp % config.moe.group_sequences == 0
