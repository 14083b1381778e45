"""Rules about the model: widths and norms; heads, rotation, windows; how many experts there are and how they are
chosen. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moe_dtensor.config.errors import Broken
from moe_dtensor.config.resolve import (
    FORCED,
    head_widths,
    is_latent,
    moe_layers,
    shard_ranks,
    shard_words,
)
from moe_dtensor.config.schema import Config


def check_model(config: Config) -> Broken:
    """Widths, norms and biases, of a config that is not resolved."""
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


def check_attention(config: Config) -> Broken:
    """All rules, of a resolved config."""
    yield from _heads(config)
    yield from _latent(config)
    yield from _rotation(config)
    yield from _scaling(config)
    yield from _windows(config)
    yield from _backend(config)


def _heads(config: Config) -> Broken:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}.",
            f"Set model.num_kv_heads to a divisor of {model.num_heads}.",
        )


def _latent(config: Config) -> Broken:
    model = config.model
    widths = {name: getattr(model, name) for name in ("nope_dim", "rope_dim", "v_dim")}
    if not is_latent(config):
        given = [name for name, value in {"q_rank": model.q_rank, **widths}.items() if value]
        if given:
            yield f"model.{given[0]} is for latent attention, but model.kv_rank = 0.", "Set model.kv_rank, or clear it."
        return
    missing = [name for name, value in widths.items() if not value]
    if missing:
        yield f"model.kv_rank = {model.kv_rank} needs model.{missing[0]}.", f"Set model.{missing[0]} above 0."
    if model.num_kv_heads != model.num_heads:
        yield (
            f"model.num_kv_heads = {model.num_kv_heads} with model.kv_rank: latent attention has a key for each of "
            f"model.num_heads = {model.num_heads}.",
            "Set model.num_kv_heads = 0.",
        )
    for key, plain in (("qk_norm", "none"), ("attention_bias", "none"), ("clip_qkv", 0.0)):
        value = getattr(model, key)
        if value != plain:
            yield (
                f"model.{key} = {value} with model.kv_rank: latent attention has norms of its latents instead.",
                f"Set model.{key} = {plain}, or model.kv_rank = 0.",
            )
    for key, rank in (("q_rank", model.q_rank), ("kv_rank", model.kv_rank)):
        if rank % shard_ranks(config):
            yield (
                f"model.{key} = {rank} is not a multiple of {shard_words(config)}, along which FSDP cuts it.",
                f"Set mesh.dp to a divisor of {rank}.",
            )


def _rotation(config: Config) -> Broken:
    model = config.model
    query, _, rotated = head_widths(config)
    for key, base in (("rope_theta", model.rope_theta), ("window_theta", model.window_theta)):
        if 0 < base <= 1:
            yield f"model.{key} = {base}: no pair of dimensions turns slower than the one before.", "Set it above 1."
    if rotated % 2:
        key = "rope_dim" if is_latent(config) else "rotary_dim" if rotated != query else "head_dim"
        remedy = f"Set model.{key} = {rotated + 1}"
        more = ", or change model.dim or model.num_heads" if key == "head_dim" else ""
        yield f"model.{key} = {rotated} is odd, but the rotary embedding turns pairs.", f"{remedy}{more}."
    if not is_latent(config) and rotated > model.head_dim:
        yield (
            f"model.rotary_dim = {rotated} is above model.head_dim = {model.head_dim}.",
            f"Set model.rotary_dim to at most {model.head_dim}.",
        )


def _scaling(config: Config) -> Broken:
    rope = config.rope
    if rope.scaling in ("llama3", "yarn", "longrope") and not rope.original_length:
        yield (
            f"rope.scaling = {rope.scaling} needs rope.original_length.",
            "Set it to the longest context before scaling.",
        )
    if rope.scaling == "longrope" and rope.original_length == 1 and rope.factor > 1 and not rope.attention_factor:
        yield (
            "rope.original_length = 1 with rope.scaling = longrope, which divides by its logarithm.",
            "Set it to the longest context before scaling, or set rope.attention_factor.",
        )
    if rope.scaling == "none" and rope.factor != 1:
        yield f"rope.factor = {rope.factor} with rope.scaling = none.", "Set rope.scaling, or rope.factor = 1."
    if rope.scaling == "none" and rope.attention_factor:
        yield (
            f"rope.attention_factor = {rope.attention_factor} with rope.scaling = none.",
            "Set rope.scaling, or rope.attention_factor = 0.",
        )
    if rope.scaling == "llama3" and not rope.low < rope.high:
        yield f"rope.low = {rope.low} is not below rope.high = {rope.high}.", "Set rope.low below rope.high."
    if rope.scaling == "yarn" and not rope.beta_slow < rope.beta_fast:
        yield (
            f"rope.beta_slow = {rope.beta_slow} is not below rope.beta_fast = {rope.beta_fast}.",
            "Set rope.beta_slow below rope.beta_fast.",
        )
    if rope.scaling == "longrope":
        pairs = head_widths(config).rotated // 2
        for key, factors in (("short_factors", rope.short_factors), ("long_factors", rope.long_factors)):
            if len(factors) != pairs:
                yield (
                    f"rope.{key} has {len(factors)} factors, but {pairs} pairs of dimensions are rotated.",
                    f"Give rope.{key} {pairs} numbers.",
                )
            elif min(factors) <= 0:
                yield f"rope.{key} has {min(factors)}, which divides nothing.", "Give factors above 0."


def _windows(config: Config) -> Broken:
    model = config.model
    if not model.window:
        for key, value in (("window_layers", list(model.window_layers)), ("window_theta", model.window_theta)):
            if value:
                yield f"model.{key} = {value} with model.window = 0.", f"Set model.window, or clear model.{key}."
    for key, pattern in (("window_layers", model.window_layers), ("rope_layers", model.rope_layers)):
        if len(pattern) > model.num_layers:
            yield (
                f"model.{key} names {len(pattern)} blocks, but model.num_layers = {model.num_layers}.",
                f"Give at most {model.num_layers}.",
            )


def _backend(config: Config) -> Broken:
    backend, dtype = config.model.attention_backend, config.training.param_dtype
    if backend == "flex" and dtype == "float64":
        yield (
            "model.attention_backend = flex has no kernel for training.param_dtype = float64.",
            "Set model.attention_backend to auto or plain.",
        )
    if backend != "fa4":
        return
    if dtype != "bfloat16":
        yield (
            f"model.attention_backend = fa4 computes in bfloat16, not training.param_dtype = {dtype}.",
            "Set model.attention_backend = auto, or training.param_dtype = bfloat16.",
        )
    wrong = [width for width in head_widths(config)[:2] if width % 8 or width > 256]
    if wrong:
        yield (
            f"model.attention_backend = fa4 takes heads of up to 256 dimensions, in steps of 8, not of {wrong[0]}.",
            "Set model.attention_backend = auto, or change the width of heads.",
        )


def check_packages(config: Config) -> Broken:
    """Extras that backends take by name."""
    if config.moe.backend == "quack" and config.moe.num_experts and importlib.util.find_spec("quack") is None:
        yield _missing("moe.backend", "quack", "quack-kernels")
    if config.model.attention_backend == "fa4" and not has_flash_attention_4():
        yield _missing("model.attention_backend", "fa4", "flash-attn-4")


def _missing(key: str, name: str, package: str) -> tuple[str, str]:
    return (
        f"{key} = {name} needs the package {package}, which is not installed.",
        f'Run `pip install "moe_dtensor[{name}]"` (from a clone: `pip install -e ".[{name}]"`), or set {key} = auto.',
    )


def has_flash_attention_4() -> bool:
    """Whether the package is installed, without loading it or torch. Older ones have its name, ``flash_attn``, too."""
    spec = importlib.util.find_spec("flash_attn")
    folders = spec.submodule_search_locations or () if spec else ()
    return any(Path(folder, "cute", "interface.py").is_file() for folder in folders)


def check_experts(config: Config) -> Broken:
    """How many there are, and in which blocks."""
    moe, layers = config.moe, config.model.num_layers
    if moe.num_experts == 0:
        if moe.layers:
            yield (
                f"moe.layers = {list(moe.layers)} with moe.num_experts = 0.",
                "Set moe.num_experts, or clear moe.layers.",
            )
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"moe.top_k = {moe.top_k} is above moe.num_experts = {moe.num_experts}.",
            f"Set moe.top_k to at most {moe.num_experts}.",
        )
    few = [k for k in moe.top_k_by_layer if k < 1]
    if few:
        yield f"moe.top_k_by_layer has {few[0]}, which is too small.", "Set moe.top_k to 1 or more in every block."
    wrong = [i for i in moe.layers if not 0 <= i < layers]
    if wrong:
        yield (
            f"moe.layers names block {wrong[0]}, but model.num_layers = {layers} has blocks 0 to {layers - 1}.",
            "Take it out of moe.layers, or raise model.num_layers.",
        )
    if len(set(moe.layers)) < len(moe.layers):
        yield f"moe.layers = {list(moe.layers)} names a block twice.", "Name each block once."
    if not moe_layers(config):
        yield (
            f"moe.every = {moe.every} makes no MoE block of model.num_layers = {layers}.",
            f"Set moe.every to at most {layers}, or moe.num_experts = 0 for a dense model.",
        )
    if config.training.microbatch_size % moe.group_sequences:
        yield (
            f"moe.group_sequences = {moe.group_sequences} does not divide "
            f"training.microbatch_size = {config.training.microbatch_size}.",
            "Set moe.group_sequences to a divisor, or to 0 for the whole microbatch.",
        )


def check_routing(config: Config) -> Broken:
    """Which choices stand together."""
    moe = config.moe
    if moe.num_experts == 0:
        return
    sums_to_one = moe.normalize_gates or (moe.score == "softmax" and not moe.score_before_top_k)
    if sums_to_one and moe.top_k == 1:
        key = "moe.normalize_gates = true" if moe.normalize_gates else "moe.score_before_top_k = false"
        yield (
            f"{key} with moe.top_k = 1: the one gate is always 1, so the router gets no gradient.",
            "Take that out, or set moe.top_k to 2 or more.",
        )
    if moe.gate_on == "input" and moe.top_k > 1:
        yield (
            f"moe.gate_on = input with moe.top_k = {moe.top_k}: a token's copies would be different vectors.",
            "Set moe.gate_on = output, or moe.top_k = 1.",
        )
    if moe.shared_gate and not moe.shared_hidden_dim:
        yield (
            "moe.shared_gate = true without a shared expert.",
            "Set moe.num_shared_experts or moe.shared_hidden_dim, or take moe.shared_gate out.",
        )
    yield from _expert_groups(config)
    chosen_by_experts = moe.router == "expert_choice"
    own_bias = moe.selection_bias and moe.bias_rate == 0
    for key, on, why in (
        ("moe.capacity_factor", moe.capacity_factor > 0 and chosen_by_experts, "gives every expert the same load"),
        ("moe.bias_rate", moe.bias_rate > 0 and chosen_by_experts, "gives every expert the same load"),
        ("moe.normalize_gates", moe.normalize_gates and chosen_by_experts, "gives tokens any number of experts"),
        ("moe.score_before_top_k", not moe.score_before_top_k and chosen_by_experts, "chooses by scores"),
        ("moe.bias_rate", moe.bias_rate > 0 and moe.router in FORCED, "looks at no bias"),
        ("moe.selection_bias", own_bias and moe.router in FORCED, "looks at no bias"),
        ("moe.selection_bias", own_bias and chosen_by_experts, "lets experts choose, not tokens"),
        ("moe.gate_on = input", moe.gate_on == "input" and chosen_by_experts, "gives tokens any number of experts"),
    ):
        if on:
            yield f"moe.router = {moe.router} {why}; {key} has no place there.", f"Take {key} out."


def _expert_groups(config: Config) -> Broken:
    moe = config.moe
    if moe.expert_groups == 0:
        if moe.group_score != "top2":
            yield "moe.group_score without moe.expert_groups.", "Set moe.expert_groups, or take moe.group_score out."
        if moe.expert_groups_kept:
            yield (
                f"moe.expert_groups_kept = {moe.expert_groups_kept} without moe.expert_groups.",
                "Set moe.expert_groups, or take moe.expert_groups_kept out.",
            )
        return
    if moe.router in ("expert_choice", *FORCED):
        yield (
            f"moe.expert_groups = {moe.expert_groups} limits the choice of tokens, but with moe.router = "
            f"{moe.router} they have none.",
            "Take moe.expert_groups and moe.expert_groups_kept out, or choose sinkhorn or topk.",
        )
    if moe.num_experts % moe.expert_groups:
        yield (
            f"moe.num_experts = {moe.num_experts} is not a multiple of moe.expert_groups = {moe.expert_groups}.",
            f"Set moe.expert_groups to a divisor of {moe.num_experts}.",
        )
    if not 0 < moe.expert_groups_kept <= moe.expert_groups:
        yield (
            f"moe.expert_groups_kept = {moe.expert_groups_kept} of moe.expert_groups = {moe.expert_groups}.",
            f"Set moe.expert_groups_kept to a number from 1 to {moe.expert_groups}.",
        )
    within = moe.expert_groups_kept * (moe.num_experts // moe.expert_groups)
    if moe.top_k > within:
        yield (
            f"moe.top_k = {moe.top_k} is above the {within} experts of moe.expert_groups_kept = "
            f"{moe.expert_groups_kept} groups.",
            "Keep more groups, or lower moe.top_k.",
        )
