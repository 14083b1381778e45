"""What both sides are given: full initial tensors by name, and one global batch with uneven targets.

The names and shapes are the checkpoint's, written down here a second time so that a parameter which
the library forgot, misnamed or transposed is a mismatch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_dtensor.config.resolve import GATED, moe_layers, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.oracle import IGNORED, Microbatch


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of a resolved config, by its checkpoint name."""
    model = config.model
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (padded_vocab(config), model.dim)}
    with_experts = moe_layers(config)
    for i in range(model.num_layers + model.mtp_depth):
        block = f"layers.{i}."
        if i >= model.num_layers:
            shapes[block + "mtp_projection.weight"] = (model.dim, 2 * model.dim)
            for name in ("embedding_norm", "stream_norm", "norm"):
                shapes |= _norm_shapes(config, f"{block}mtp_{name}")
        for half in ("attention", "ffn"):
            if model.norm_at != "post":
                shapes |= _norm_shapes(config, f"{block}{half}_norm")
            if model.norm_at != "pre":
                shapes |= _norm_shapes(config, f"{block}{half}_post_norm")
        shapes |= {f"{block}attention.{name}": shape for name, shape in _attention_shapes(config).items()}
        if i in with_experts:
            shapes |= {f"{block}moe.{name}": shape for name, shape in _moe_shapes(config).items()}
        else:
            shapes |= _feed_forward_shapes(config, block + "feed_forward.", model.hidden_dim)
            if model.ffn_bias:
                hidden_biases = ("gate.bias", "up.bias") if model.activation in GATED else ("up.bias",)
                shapes |= {f"{block}feed_forward.{name}": (model.hidden_dim,) for name in hidden_biases}
                shapes[block + "feed_forward.output_bias"] = (model.dim,)
    shapes |= _norm_shapes(config, "norm")
    if not model.tie_embeddings:
        shapes["output.weight"] = (padded_vocab(config), model.dim)
    if model.head_bias:
        shapes["output.bias"] = (padded_vocab(config),)
    return shapes


def _norm_shapes(config: Config, name: str) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {name + ".weight": (config.model.dim,)}
    return weight | ({name + ".bias": (config.model.dim,)} if config.model.norm_bias else {})


def _attention_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model = config.model
    shapes = _latent_shapes(config) if model.kv_rank else _head_shapes(config)
    width = model.num_heads * (model.v_dim or model.head_dim)
    shapes["wo.weight"] = (model.dim, width)
    if model.attention_bias == "all":
        shapes["output_bias"] = (model.dim,)
    if model.attention_gate:
        shapes["gate.weight"] = (width, model.dim)
    if model.sinks:
        shapes["sinks"] = (model.num_heads,)
    return shapes


def _head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model = config.model
    widths = {
        name: heads * model.head_dim
        for name, heads in (("q", model.num_heads), ("k", model.num_kv_heads), ("v", model.num_kv_heads))
    }
    shapes: dict[str, tuple[int, ...]] = {f"w{name}.weight": (width, model.dim) for name, width in widths.items()}
    if model.attention_bias != "none":
        shapes |= {f"w{name}.bias": (width,) for name, width in widths.items()}
    if model.qk_norm != "none":
        whole = model.qk_norm == "full"
        shapes |= {f"{name}_norm.weight": (widths[name] if whole else model.head_dim,) for name in "qk"}
    return shapes


def _latent_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model = config.model
    width = model.num_heads * (model.nope_dim + model.rope_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "wkv_a.weight": (model.kv_rank + model.rope_dim, model.dim),
        "kv_a_norm.weight": (model.kv_rank,),
        "wkv_b.weight": (model.num_heads * (model.nope_dim + model.v_dim), model.kv_rank),
    }
    if not model.q_rank:
        return shapes | {"wq.weight": (width, model.dim)}
    return shapes | {
        "wq_a.weight": (model.q_rank, model.dim),
        "q_a_norm.weight": (model.q_rank,),
        "wq_b.weight": (width, model.q_rank),
    }


def _moe_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    dim, moe = config.model.dim, config.moe
    ups = 2 if config.model.activation in GATED else 1
    shapes: dict[str, tuple[int, ...]] = {
        "router.weight": (moe.num_experts, dim),
        "experts.w_up": (moe.num_experts, ups, moe.hidden_dim, dim),
        "experts.w_down": (moe.num_experts, dim, moe.hidden_dim),
    }
    if moe.expert_bias:
        shapes["experts.up_bias"] = (moe.num_experts, ups, moe.hidden_dim)
        shapes["down_bias"] = (moe.num_experts, dim)
    if moe.router_bias:
        shapes["router.logit_bias"] = (moe.num_experts,)
    if moe.shared_hidden_dim:
        shapes |= _feed_forward_shapes(config, "shared.", moe.shared_hidden_dim)
    if moe.shared_gate:
        shapes["shared.token_gate.weight"] = (1, dim)
    return shapes


def _feed_forward_shapes(config: Config, prefix: str, hidden: int) -> dict[str, tuple[int, ...]]:
    dim = config.model.dim
    shapes: dict[str, tuple[int, ...]] = {prefix + "up.weight": (hidden, dim), prefix + "down.weight": (dim, hidden)}
    if config.model.activation in GATED:
        shapes[prefix + "gate.weight"] = (hidden, dim)
    return shapes


def initial_values(config: Config, *, empty_expert: bool = False) -> dict[str, Tensor]:
    """Random full tensors, float64 but representable in ``training.param_dtype``.

    No weight is 0 or 1 at the start and no width is preserved by chance: a norm weight left out, or a
    projection at its tiny initial scale, would hide what it multiplies.

    Args:
        config: resolved.
        empty_expert: make expert 0 of every layer the average of the others, so that none ever scores
            it highest: with top-1 routing it gets no token.
    """
    generator = torch.Generator().manual_seed(config.training.seed)
    dtype = getattr(torch, config.training.param_dtype)
    values = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            value = 1 + noise / 4
        else:
            value = noise / math.sqrt(shape[-1])
        if empty_expert and name.endswith("router.weight"):
            value[0] = value[1:].mean(0)
        values[name] = value.to(dtype).double()
    return values


def initial_bias(config: Config) -> dict[int, Tensor]:
    """What each MoE block's choice starts with, ``(E,)`` float32 by the block's index: of the size of scores where
    there is a bias, so that it changes choices at once, else 0."""
    generator = torch.Generator().manual_seed(config.training.seed)
    size = 0.05 if config.moe.selection_bias else 0.0
    return {i: torch.randn(config.moe.num_experts, generator=generator) * size for i in sorted(moe_layers(config))}


def global_batch(config: Config, step: int = 1) -> list[Microbatch]:
    """A step's microbatches in order; every sequence has its own number of targets, the first of several only one."""
    training = config.training
    generator = torch.Generator().manual_seed(training.seed + step)
    shape = (training.global_batch_size, training.seq_len)
    tokens, labels = (torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(2))
    if training.seq_len > 1:
        # One token over and over makes all rows of Sinkhorn's plan alike, and rounding would choose the experts.
        alike = (tokens == tokens[:, :1]).all(1)
        tokens[alike, -1] = (tokens[alike, -1] + 1) % config.model.vocab_size
    ignored = torch.randint(0, training.seq_len // 2 + 1, (shape[0],), generator=generator)
    if shape[0] > 1:
        ignored[0] = training.seq_len - 1
    for row, count in zip(labels, ignored.tolist(), strict=True):
        row[torch.randperm(training.seq_len, generator=generator)[:count]] = IGNORED
    documents = None
    if config.data.document_mask:
        documents = (torch.rand(shape, generator=generator) < 0.3).long().cumsum(1)
    first = (step - 1) * shape[0]
    return [
        Microbatch(
            tokens[held],
            labels[held],
            None if documents is None else documents[held],
            range(first + held.start, first + held.stop),
        )
        for held in (slice(i, i + training.microbatch_size) for i in range(0, shape[0], training.microbatch_size))
    ]
