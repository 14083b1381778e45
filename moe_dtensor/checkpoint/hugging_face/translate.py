"""config.json to our config and back, by a family's table and what a config says about the function that its weights
compute. Loads no torch.

Two configs of equal functions compute the same logits from the same weights, however else they differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_dtensor.checkpoint.hugging_face.families import FAMILIES
from moe_dtensor.checkpoint.hugging_face.keys import Ahead, Implied
from moe_dtensor.checkpoint.hugging_face.table import Family, Function, Raw
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build
from moe_dtensor.config.resolve import FORCED, block_config, block_rotates, block_window, moe_layers, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import show

COMPUTED_IN = {"bfloat16": "bfloat16", "float32": "float32", "float64": "float64", "float16": "bfloat16"}
"""``training.param_dtype`` by config.json's dtype."""
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


@dataclass(frozen=True)
class Described:
    """What a config.json describes."""

    family: Family
    function: Function
    dtype: str
    """That the weights are said to be in."""
    max_positions: int | None


def read_config(folder: str | Path) -> Described:
    """What the config.json in ``folder`` describes.

    Raises:
        ConfigError: there is none, no table knows its ``model_type``, or it asks for what our config cannot express.
    """
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.", "Give a Hugging Face model's folder.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.", "Fetch the file again.") from None
    return describe(content, str(path))


def describe(content: Mapping[str, Any], where: str) -> Described:
    """The same of a config.json's content."""
    model_type = content.get("model_type") if isinstance(content, Mapping) else None
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type = {model_type!r} has no table.", f"There are tables for {', '.join(FAMILIES)}."
        )
    quantized = content.get("quantization_config")
    family = FAMILIES[model_type]
    method = quantized.get("quant_method", quantized) if isinstance(quantized, Mapping) else quantized
    if method in family.packed_as:
        content = {key: value for key, value in content.items() if key != "quantization_config"}
    elif quantized:
        raise ConfigError(
            f"{where}: quantization_config says {method}; quantised weights are not read as numbers.",
            "Dequantise the folder to bfloat16 first.",
        )
    raw, function = Raw(content, where), neutral_function()
    for key in family.keys:
        key.read(raw, function)
    raw.check()
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    return Described(family, function, dtype, content.get("max_position_embeddings"))


def config_of(described: Described) -> Config:
    """A config of ours, not resolved, that computes this function; all else is default but the dtype of computation."""
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    for key, value in described.function.items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    model, moe = tables["model"], tables["moe"]
    dense_blocks = model["num_layers"] - len(moe["layers"])
    if not dense_blocks or not moe["num_experts"]:
        moe["layers"] = ()
    if not dense_blocks:
        del model["hidden_dim"]
    if moe["num_experts"]:
        width = moe.pop("shared_hidden_dim")
        number, rest = divmod(width, moe["hidden_dim"])
        moe |= {"num_shared_experts": 1, "shared_hidden_dim": width} if rest else {"num_shared_experts": number}
    else:
        tables["moe"] = {"num_experts": 0}
    config = build(tables)
    dtype = COMPUTED_IN.get(described.dtype, "bfloat16")
    master = "float64" if dtype == "float64" else "float32"
    training = replace(config.training, param_dtype=dtype, dtype=master, reduce_dtype=master)  # type: ignore[arg-type]
    return replace(config, training=training)


def write_config(family: Family, config: Config, dtype: str) -> dict[str, Any]:
    """The config.json of a resolved config as this family; both styles of positions, dtype and experts at once.

    Raises:
        ConfigError: the family's class cannot hold it; see :func:`unexpressed`.
    """
    function = function_of(config)
    problems = unexpressed(family, function)
    if problems:
        raise ConfigError(
            f"{family.model_type} cannot hold this model: {'; '.join(problems)}.",
            "Choose another --architecture, or auto.",
        )
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        key.write(function, raw)
    length = "max_seq_len" if family.model_type == "dbrx" else "max_position_embeddings"
    return raw | dict(family.constants) | {length: config.training.seq_len, "dtype": dtype, "torch_dtype": dtype}


def unexpressed(family: Family, function: Function) -> list[str]:
    """Why a family's class cannot hold a function: ``key = value`` with what it could; empty if it can.

    A config.json is written and read again; what comes back otherwise cannot be said there.
    """
    if not function["moe.num_experts"] and any(getattr(key, "native", "") == "moe.num_experts" for key in family.keys):
        return ["moe.num_experts = 0"]
    if not holds_mtp(family):
        function = function | {"model.mtp_depth": 0}  # it takes no part in evaluation, and is left out
    raw: dict[str, Any] = {"model_type": family.model_type}
    for key in family.keys:
        key.write(function, raw)
    try:
        back = describe(raw, family.model_type).function
    except ConfigError as error:
        return [error.problem]
    same_there = {(k.native, v) for k in family.keys if isinstance(k, Implied) for v in k.also}
    return [
        f"{key} = {show(function[key])}, it has {show(back[key])}"
        for key in differing(function, back)
        if (key, function[key]) not in same_there
    ]


def holds_mtp(family: Family) -> bool:
    """Whether its files have a place for multi-token prediction."""
    return any(isinstance(key, Ahead) for key in family.keys)


def unpublished(family: Family, function: Function) -> list[str]:
    """What the class can hold and no published checkpoint has; see :attr:`Family.published`."""
    return [
        f"{key} = {show(function[key])}, published ones have {' or '.join(map(show, values))}"
        for key, values in family.published.items()
        if function[key] not in values
    ]


def choose_family(config: Config, architecture: str = "auto") -> Family:
    """The family to export a config as: the one named, or the first whose published checkpoints are such.

    Raises:
        ConfigError: none can, with what is nearest, or there is no table of that name.
    """
    if architecture != "auto":
        if architecture not in FAMILIES:
            raise ConfigError(f"--architecture {architecture}: no such table.", f"Choose auto, {', '.join(FAMILIES)}.")
        return FAMILIES[architecture]
    function = function_of(resolve(config, 1))
    families = list(FAMILIES.values())
    if function["model.mtp_depth"]:
        families.sort(key=lambda family: not holds_mtp(family))
    problems = {family.model_type: unexpressed(family, function) + unpublished(family, function) for family in families}
    for name, found in problems.items():
        if not found:
            return FAMILIES[name]
    nearest = sorted(problems, key=lambda name: len(problems[name]))[:3]
    told = "; ".join(f"{name} not for {', '.join(problems[name])}" for name in nearest)
    raise ConfigError(
        f"no published class can hold this model. Nearest: {told}.",
        "docs/hugging_face.md has the table of classes; --architecture NAME tells all that keeps one of them away.",
    )


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
