"""config.json to our config and back, by a family's table. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_dtensor.checkpoint.hugging_face.config_json import Raw
from moe_dtensor.checkpoint.hugging_face.families import FAMILIES
from moe_dtensor.checkpoint.hugging_face.function import TABLES, Function, differing, function_of, neutral_function
from moe_dtensor.checkpoint.hugging_face.keys import Ahead, Implied
from moe_dtensor.checkpoint.hugging_face.table import Family
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import show

COMPUTED_IN = {"bfloat16": "bfloat16", "float32": "float32", "float64": "float64", "float16": "bfloat16"}
"""``training.param_dtype`` by config.json's dtype."""


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
