"""Rules about attention: heads, latents, rotation, windows. Loads no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from moe_dtensor.config.attention import head_widths, is_latent
from moe_dtensor.config.resolve import shard_ranks, shard_words
from moe_dtensor.config.schema import Config

Broken = Iterator[tuple[str, str]]
"""(rule with its values, remedy), for each broken rule."""


def attention(config: Config) -> Broken:
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
    model, dtype = config.model, config.training.param_dtype
    if model.attention_backend in ("flex", "fa4") and dtype == "float64":
        yield (
            f"model.attention_backend = {model.attention_backend} has no kernel for training.param_dtype = float64.",
            "Set model.attention_backend to auto or plain.",
        )
    if model.attention_backend == "fa4" and importlib.util.find_spec("flash_attn") is None:
        yield (
            "model.attention_backend = fa4 needs the package flash-attn-4, which is not installed.",
            "Install flash-attn-4, or set model.attention_backend to auto.",
        )
