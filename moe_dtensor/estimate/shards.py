"""What one rank holds of every parameter: names, shapes, placements; parameters and FLOPs of all. Loads no torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_dtensor.config.resolve import (
    GATED,
    attends_by_sequence,
    block_config,
    block_norms,
    block_window,
    expert_dp_ranks,
    expert_groups,
    expert_shards,
    head_widths,
    is_latent,
    microbatches,
    moe_layers,
    num_stages,
    padded_vocab,
    shard_ranks,
    stage_layers,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.placement import Row, build_table, find_row

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterShard:
    """One parameter and a rank's part of it."""

    name: str
    """As in a checkpoint, such as ``layers.3.attention.wq.weight``."""
    shape: Shape
    """Of the whole parameter."""
    row: Row
    """Its line of the placement table."""
    used: Shape
    """What a rank computes with: after tp, as FSDP gathers it; of what FSDP leaves alone the local part."""
    local: Shape
    """After tp and dp: what the first rank stores. Where dp does not divide the dimension, later ranks hold less."""

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def used_size(self) -> int:
        """Elements that a rank computes with."""
        return math.prod(self.used)

    @property
    def local_size(self) -> int:
        """Elements that the first rank stores."""
        return math.prod(self.local)


@dataclass(frozen=True)
class Folded:
    """Parameters of the same name in all blocks alike."""

    pattern: str
    """``layers.*.attention.wq.weight``, or a whole name."""
    count: int
    shard: ParameterShard
    """One of them."""


def all_shards(config: Config) -> list[ParameterShard]:
    """Every parameter of the model, in the order of its stages; ``config`` is resolved and knows its vocabulary."""
    return [shard for stage in range(num_stages(config)) for shard in stage_shards(config, stage)]


def stage_shards(config: Config, stage: int) -> tuple[ParameterShard, ...]:
    """The parameters of one pipeline stage: embedding, blocks, norm and head, as far as it has them."""
    return _stage_shards(config, stage)


@functools.lru_cache(maxsize=256)
def _stage_shards(config: Config, stage: int) -> tuple[ParameterShard, ...]:
    dim, rows = config.model.dim, padded_vocab(config)
    table, last = build_table(config), stage == num_stages(config) - 1
    of_kind: dict[tuple[bool, bool], list[ParameterShard]] = {}
    shards = [_shard_of(config, table, "tok_embeddings.weight", (rows, dim))] if stage == 0 else []
    for layer in stage_layers(config, stage):
        kind = layer >= config.model.num_layers, layer in moe_layers(config)
        if kind not in of_kind:
            of_kind[kind] = [_shard_of(config, table, name, shape) for name, shape in _block(config, layer).items()]
        shards += [replace(shard, name=f"layers.{layer}.{shard.name}") for shard in of_kind[kind]]
    ends: dict[str, Shape] = _norm(config, "norm") if last else {}
    if last and not config.model.tie_embeddings:
        ends["output.weight"] = (rows, dim)
    if last and config.model.head_bias:
        ends["output.bias"] = (rows,)
    return (*shards, *(_shard_of(config, table, name, shape) for name, shape in ends.items()))


def accumulates(config: Config) -> bool:
    """Whether FSDP keeps gradients whole, in ``reduce_dtype``, before it reduces them: not for a single microbatch,
    which it reduces as the backward pass goes, nor where shards add up. ``fsdp.accumulate`` is settled."""
    if config.compile.cuda_graph:
        return True
    return config.fsdp.accumulate == "whole" and (microbatches(config) > 1 or config.mesh.pp > 1)


def reductions(config: Config) -> int:
    """Times in a step that FSDP reduces gradients. ``fsdp.accumulate`` is settled."""
    return microbatches(config) if config.fsdp.accumulate == "sharded" else 1


def copies_over_dp(config: Config, row: Row) -> int:
    """dp ranks that hold the same part of a parameter."""
    return expert_groups(config) // expert_shards(config) if row.on_dp else config.mesh.dp_replicate


def summed_over_tp(config: Config, row: Row) -> bool:
    """Whether tp ranks hold a parameter alike and each sees a share of its gradient."""
    seen = row.gradient == "heads" or (row.gradient == "tokens" and config.mesh.sequence_parallel)
    return row.tp is None and seen and config.mesh.tp > 1


def fold(shards: Iterable[ParameterShard]) -> list[Folded]:
    """One entry for all blocks alike, in the order of their first."""
    groups: dict[tuple[str, Shape], list[ParameterShard]] = {}
    for shard in shards:
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", shard.name)
        groups.setdefault((pattern, shard.local), []).append(shard)
    return [Folded(pattern, len(group), group[0]) for (pattern, _), group in groups.items()]


def _shard_of(config: Config, table: tuple[Row, ...], name: str, shape: Shape) -> ParameterShard:
    row = find_row(table, name)
    after_tp = shape if row.tp is None else _cut(shape, row.tp, config.mesh.tp)
    if not row.on_dp:
        return ParameterShard(name, shape, row, after_tp, _cut(after_tp, row.dp, shard_ranks(config)))
    used = _cut(after_tp, row.dp, expert_dp_ranks(config))
    local = used if row.groups is None else _cut(used, row.groups, expert_shards(config))
    return ParameterShard(name, shape, row, used, local)


def _cut(shape: Shape, dim: int, parts: int) -> Shape:
    return tuple(-(-size // parts) if i == dim else size for i, size in enumerate(shape))


def _block(config: Config, layer: int) -> dict[str, Shape]:
    model, moe = config.model, config.moe
    dim = model.dim
    shapes: dict[str, Shape] = {}
    for name in block_norms(config):
        shapes |= _norm(config, name)
    shapes |= {f"attention.{name}": shape for name, shape in attention_shapes(config).items()}
    if layer >= model.num_layers:
        shapes["mtp_projection.weight"] = (dim, 2 * dim)
        for name in ("embedding_norm", "stream_norm", "norm"):
            shapes |= _norm(config, f"mtp_{name}")
    if layer not in moe_layers(config):
        return shapes | _feed_forward(config, "feed_forward", model.hidden_dim, model.ffn_bias)
    gates = 2 if model.activation in GATED else 1
    shapes["moe.router.weight"] = (moe.num_experts, dim)
    shapes["moe.experts.w_up"] = (moe.num_experts, gates, moe.hidden_dim, dim)
    shapes["moe.experts.w_down"] = (moe.num_experts, dim, moe.hidden_dim)
    if moe.expert_bias:
        shapes["moe.experts.up_bias"] = (moe.num_experts, gates, moe.hidden_dim)
        shapes["moe.down_bias"] = (moe.num_experts, dim)
    if moe.router_bias:
        shapes["moe.router.logit_bias"] = (moe.num_experts,)
    if moe.shared_hidden_dim:
        shapes |= _feed_forward(config, "moe.shared", moe.shared_hidden_dim)
        if moe.shared_gate:
            shapes["moe.shared.token_gate.weight"] = (1, dim)
    return shapes


def _norm(config: Config, name: str) -> dict[str, Shape]:
    parts = ("weight", "bias") if config.model.norm_bias else ("weight",)
    return {f"{name}.{part}": (config.model.dim,) for part in parts}


def _feed_forward(config: Config, prefix: str, hidden: int, bias: bool = False) -> dict[str, Shape]:
    dim = config.model.dim
    ups = ("gate", "up") if config.model.activation in GATED else ("up",)
    shapes: dict[str, Shape] = {f"{prefix}.{name}.weight": (hidden, dim) for name in ups}
    if bias:
        shapes |= {f"{prefix}.{name}.bias": (hidden,) for name in ups}
        shapes[f"{prefix}.output_bias"] = (dim,)
    return shapes | {f"{prefix}.down.weight": (dim, hidden)}


def attention_shapes(config: Config) -> dict[str, Shape]:
    """Of every parameter of a resolved config's attention, by its name in it."""
    model, width = config.model, config.model.num_heads * head_widths(config).value
    shapes = _latent_shapes(config) if is_latent(config) else _head_shapes(config)
    shapes["wo.weight"] = (model.dim, width)
    if model.attention_bias == "all":
        shapes["output_bias"] = (model.dim,)
    if model.attention_gate:
        shapes["gate.weight"] = (width, model.dim)
    if model.sinks:
        shapes["sinks"] = (model.num_heads,)
    return shapes


def gathered_by_attention(config: Config) -> list[int]:
    """Elements of each weight that tp ranks gather whole in a block: of attention by sequences (``mesh.attention``)."""
    if not attends_by_sequence(config):
        return []
    table, shapes = build_table(config), attention_shapes(config)
    return [math.prod(shapes[name]) for name in shapes if find_row(table, f"attention.{name}").tp is not None]


def _head_shapes(config: Config) -> dict[str, Shape]:
    model = config.model
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, model.dim) for name, rows in _rows(heads, kv_heads)}
    if model.attention_bias != "none":
        shapes |= {f"{name}.bias": (rows,) for name, rows in _rows(heads, kv_heads)}
    if model.qk_norm != "none":
        whole = model.qk_norm == "full"
        shapes["q_norm.weight"] = (heads if whole else model.head_dim,)
        shapes["k_norm.weight"] = (kv_heads if whole else model.head_dim,)
    return shapes


def _rows(heads: int, kv_heads: int) -> tuple[tuple[str, int], ...]:
    return ("wq", heads), ("wk", kv_heads), ("wv", kv_heads)


def _latent_shapes(config: Config) -> dict[str, Shape]:
    model = config.model
    queries = model.num_heads * (model.nope_dim + model.rope_dim)
    shapes: dict[str, Shape] = (
        {
            "wq_a.weight": (model.q_rank, model.dim),
            "q_a_norm.weight": (model.q_rank,),
            "wq_b.weight": (queries, model.q_rank),
        }
        if model.q_rank
        else {"wq.weight": (queries, model.dim)}
    )
    return shapes | {
        "wkv_a.weight": (model.kv_rank + model.rope_dim, model.dim),
        "kv_a_norm.weight": (model.kv_rank,),
        "wkv_b.weight": (model.num_heads * (model.nope_dim + model.v_dim), model.kv_rank),
    }


def parameters(config: Config) -> tuple[int, int]:
    """Parameters of the whole model, and those that one token meets (K experts and not E): ``(total, active)``.

    The embedding counts in both, though a token only reads a row of it.
    """
    sizes = {shard.name: shard.size for shard in all_shards(config)}
    total, unmet = sum(sizes.values()), 0
    for name, size in sizes.items():
        if ".experts." in name:
            moe = block_config(config, int(name.split(".")[1])).moe
            unmet += size // moe.num_experts * (moe.num_experts - moe.top_k)
    return total, total - unmet


def flops_per_token(config: Config) -> float:
    """FLOPs of one token, forward and backward: 6 per active weight of a matrix product, and the attention products.

    As in Kaplan et al. (arXiv:2001.08361) and PaLM (arXiv:2204.02311): the embedding lookup costs nothing, the head
    does; causal attention counts half of the S x S scores, or what a window leaves of them; nothing is added for
    recomputation.
    """
    model = config.model
    _, active = parameters(config)
    lookup = 0 if model.tie_embeddings else padded_vocab(config) * model.dim
    # Multi-token prediction runs the head once more for each depth.
    active += model.mtp_depth * padded_vocab(config) * model.dim
    return 6.0 * (active - lookup) + score_flops_per_token(config)


def score_flops_per_token(config: Config) -> float:
    """FLOPs of q k^T and of its product with v, forward and backward, of one token in all blocks, those of further
    tokens too.

    A query sees half of the sequence on average, or of a window w of S positions w - w^2 / 2S. Documents, which the
    config does not know, are not subtracted.
    """
    model, length = config.model, config.training.seq_len
    query, value, _ = head_widths(config)
    windows = [block_window(config, layer) or length for layer in range(model.num_layers + model.mtp_depth)]
    seen = sum(min(w, length) - min(w, length) ** 2 / (2 * length) for w in windows)
    return 6 * model.num_heads * (query + value) * seen
