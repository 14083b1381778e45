"""Attention of one block by arithmetic: shapes of its parameters, its products, the bytes it keeps. Loads no torch.

D model width, H query heads, G key and value heads, C width of a query or key head, V of a value head.
"""

from __future__ import annotations

from moe_dtensor.config.resolve import block_rotates, block_window, head_widths, is_latent, sees_more_than_causal
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.sizes import Sizes

Shape = tuple[int, ...]


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


def attention_bytes(config: Config, at: Sizes, layer: int) -> int:
    """What attention of block ``layer`` keeps of a microbatch: the projections' input; q, k, v as they are read; output
    and row sums; what norms, clamps, latents, gate and sinks read.

    Where tp brings ranks' tokens together also the output in their order.
    """
    model, tp = config.model, config.mesh.tp
    query, value, _ = head_widths(config)
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    output = heads * value * at.compute
    per_token = model.dim * at.compute + output + 4 * heads
    if tp > 1 and config.mesh.sequence_parallel:
        per_token += output
    read = (heads + kv_heads) * query + kv_heads * value
    if is_latent(config):
        per_token += _latent_bytes(config, at, heads)
    else:
        per_token += read * at.compute + _qk_norm_bytes(config, at, heads, kv_heads, layer)
        if model.clip_qkv:
            per_token += read * at.compute
    if model.attention_gate:  # the sigmoid, and what it makes of the output
        per_token += 2 * output
    if model.sinks:  # the heads' shares, and what they make of the output
        per_token += output + 4 * heads
    return at.whole * (per_token + _mask_bytes(config, at, layer))


def _latent_bytes(config: Config, at: Sizes, heads: int) -> int:
    """A token's latents before and after their norm; q and k as they are read; k and v as they are made."""
    model = config.model
    made = heads * (model.nope_dim + model.v_dim)
    latents = 2 * (model.q_rank + model.kv_rank) + model.rope_dim
    norms = at.wide * (2 if model.q_rank else 1)
    return (latents + made + 2 * heads * (model.nope_dim + model.rope_dim)) * at.compute + norms


def has_kernel(config: Config, layer: int) -> bool:
    """Whether on a GPU kernels norm and rotate queries and keys of block ``layer`` (``layers/attention.py``)."""
    model, widths = config.model, head_widths(config)
    plain = block_rotates(config, layer) and not model.clip_qkv and model.qk_norm != "head_after_rope"
    return (
        plain and config.training.param_dtype != "float64" and widths.rotated == widths.query and not is_latent(config)
    )


def _qk_norm_bytes(config: Config, at: Sizes, heads: int, kv_heads: int, layer: int) -> int:
    """A token's q and k before their norm, and of a norm over the whole width that tp splits the sums of squares.

    Where no kernel does it, the reciprocal deviations of any norm, and of one over the whole width, compiled and where
    ranks' tokens come together, also q and k between norm and weight.
    """
    model, mesh, width = config.model, config.mesh, (heads + kv_heads) * config.model.head_dim
    if model.qk_norm == "none":
        return 0
    if has_kernel(config, layer):
        return width * at.compute + (2 * at.wide if model.qk_norm == "full" and mesh.tp > 1 else 0)
    if model.qk_norm != "full":
        return width * at.compute + (heads + kv_heads) * at.wide
    compiled = at.compute * (2 if mesh.tp > 1 and mesh.sequence_parallel else 1)
    return width * (compiled if config.compile.enable else at.wide + at.compute) + 2 * at.wide


def _mask_bytes(config: Config, at: Sizes, layer: int) -> int:
    """A token's row of the mask, as a bias in the compute dtype, where no kernel knows what is seen."""
    model, dtype = config.model, config.training.param_dtype
    plain = model.attention_backend == "plain" or (model.attention_backend == "auto" and dtype == "float64")
    return config.training.seq_len * at.compute if plain and sees_more_than_causal(config, layer) else 0


def gradient_bytes(config: Config, at: Sizes) -> int:
    """Gradients of attention's output, of q, k and v and of what made k and v, alive together in its backward pass."""
    model, tp = config.model, config.mesh.tp
    query, value, _ = head_widths(config)
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    made = heads * (model.nope_dim + model.v_dim)
    return at.whole * ((heads + kv_heads) * (query + value) + made) * at.compute
