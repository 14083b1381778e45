"""What a config says about the function that its weights compute, as flat values by ``table.key``. Loads no torch.

Two configs with equal values here compute the same logits from the same weights, however else they differ.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from moe_dtensor.config.resolve import FORCED, block_config, block_rotates, block_window, moe_layers, resolve
from moe_dtensor.config.schema import Config

Function = dict[str, Any]
"""Values of ``[model]``, ``[rope]`` and ``[moe]`` by ``table.key``; ``moe.layers`` names every MoE block."""

TABLES = ("model", "rope", "moe")
TRAINING_ONLY = frozenset(
    {
        "model.init_std",
        "model.attention_backend",
        "moe.every",
        "moe.group_sequences",
        "moe.sinkhorn_iterations",
        "moe.jitter",
        "moe.capacity_factor",
        "moe.drop_by",
        "moe.balance_loss",
        "moe.balance_over",
        "moe.z_loss",
        "moe.bias_rate",
        "moe.rows",
        "moe.backend",
    }
)
"""Keys that evaluation does not ask for. A key that is not named here shapes the function."""


def function_of(config: Config) -> Function:
    """The function of a config, resolved or not, in its one canonical form.

    Routers choose by plain top-k in evaluation, whatever chooses in training, unless they are forced. Softmax gates
    normalised after the choice are those scored after it, as long as nothing is added to what the choice goes by.
    """
    config = resolve(config, 1)
    values = {
        f"{table}.{key}": value
        for table in TABLES
        for key, value in asdict(getattr(config, table)).items()
        if f"{table}.{key}" not in TRAINING_ONLY
    }
    # Those of multi-token prediction follow from the last.
    values["moe.layers"] = tuple(i for i in sorted(moe_layers(config)) if i < config.model.num_layers)
    values["moe.router"] = config.moe.router if config.moe.router in FORCED else "topk"
    values["moe.selection_bias"] = has_selection_bias(config)
    kinds = [block_config(config, i).moe for i in values["moe.layers"]]
    routers = tuple(kind.router if kind.router in FORCED else "topk" for kind in kinds)
    top_k = tuple(kind.top_k for kind in kinds)
    values["moe.router_by_layer"] = routers if len(set(routers)) > 1 else ()
    values["moe.top_k_by_layer"] = top_k if len(set(top_k)) > 1 else ()
    if kinds:
        values |= {"moe.router": routers[0], "moe.top_k": max(top_k)}
    _canonical_attention(values, config)
    # Shared experts are one feed-forward: only its width counts.
    del values["moe.num_shared_experts"]
    if values["moe.expert_groups"] == values["moe.expert_groups_kept"]:
        values["moe.expert_groups"] = values["moe.expert_groups_kept"] = 0
    after = not values["moe.score_before_top_k"]
    if after and values["moe.score"] == "softmax":
        values["moe.normalize_gates"] = True
        if not values["moe.selection_bias"] and not values["moe.expert_groups"]:
            values["moe.score_before_top_k"] = True
    return values


def _canonical_attention(values: Function, config: Config) -> None:
    """Usual widths and scales as 0; patterns that name each block, and only where blocks differ."""
    model, blocks = config.model, range(config.model.num_layers)
    if model.kv_rank or model.rotary_dim == model.head_dim:
        values["model.rotary_dim"] = 0
    if model.attention_scale == 1 / math.sqrt(model.head_dim):
        values["model.attention_scale"] = 0.0
    windows = [block_window(config, i) > 0 for i in blocks]
    rotated = [block_rotates(config, i) for i in blocks]
    values["model.window"] = model.window if any(windows) else 0
    mixed = any(windows) and not all(windows)
    values["model.window_layers"] = tuple("window" if w else "full" for w in windows) if mixed else ()
    values["model.rope_layers"] = () if all(rotated) else tuple("rope" if r else "none" for r in rotated)
    if not any(windows) or model.window_theta == model.rope_theta:
        values["model.window_theta"] = 0.0
    if not any(windows) or config.rope.scaling == "none":
        values["rope.scale_windows"] = True


def has_selection_bias(config: Config) -> bool:
    """Whether the choice of experts sees a bias."""
    return bool(config.moe.num_experts) and (config.moe.bias_rate > 0 or config.moe.selection_bias)


def neutral_function() -> Function:
    """The values that a family's table starts from: the defaults, with plain top-k."""
    return function_of(Config()) | {"moe.layers": (), "moe.num_experts": 0, "moe.shared_hidden_dim": 0}


def compared(function: Function) -> set[str]:
    """Keys that mean something in a function: not those of experts in a dense model, or of the dense feed-forward in a
    model without one."""
    if not function["moe.num_experts"]:
        return {key for key in function if not key.startswith("moe.")} | {"moe.num_experts"}
    has_dense = len(function["moe.layers"]) < function["model.num_layers"]
    return set(function) - (set() if has_dense else {"model.hidden_dim", "model.ffn_bias"})


def differing(one: Function, other: Function) -> list[str]:
    """Keys whose values differ, in the order of the schema."""
    keys = compared(one) | compared(other)
    return [key for key in one if key in keys and not _equal(one[key], other.get(key))]


def _equal(one: Any, other: Any) -> bool:
    """Numbers that were written as their inverse come back with another last bit."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-14)
    return one == other
