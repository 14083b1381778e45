"""Our weights to a Hugging Face folder: shards planned from names and sizes, written tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.axes import Row
from moe_dtensor.checkpoint.hugging_face.rows import build_rows, copied, native_shapes
from moe_dtensor.checkpoint.hugging_face.safetensors_file import total_bytes, write_file
from moe_dtensor.checkpoint.hugging_face.shards import INDEX, SINGLE
from moe_dtensor.checkpoint.hugging_face.table import Family
from moe_dtensor.checkpoint.native import NativeWeights
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config

SHARD_BYTES = 5 * 10**9
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Done = Callable[[int], Any]


@dataclass(frozen=True)
class Plan:
    """What an export writes: file tensors by shard, and how each comes from ours."""

    family: Family
    config: Config
    shards: dict[str, Layout]
    parts: dict[str, list[tuple[Row, dict[str, int]]]]
    """Of each file tensor: the rows that it is made of, and where in them."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(total_bytes(layout.values()) for layout in self.shards.values())

    def write_index(self, folder: Path) -> None:
        """``model.safetensors.index.json`` of exactly what is written; none for a single shard."""
        if list(self.shards) == [SINGLE]:
            return
        weight_map = {name: file for file, layout in self.shards.items() for name in layout}
        text = json.dumps({"metadata": {"total_size": self.size}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def plan_export(family: Family, config: Config, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Every file tensor of a resolved config in shards of at most ``shard_bytes``, as far as tensors allow."""
    always = [
        f"layers.{layer}.moe.router.bias"
        for layer in sorted(moe_layers(config))
        if any(entry.native == "layers.{i}.moe.router.bias" for entry in family.tensors)
    ]
    rows = build_rows(family, config, always=always)
    parts: dict[str, list[tuple[Row, dict[str, int]]]] = {}
    for row in rows.values():
        for name, at in row.files():
            parts.setdefault(name, []).append((row, at))
    for name, original in copied(family, config, rows).items():
        parts[name] = parts[original]
    shards: list[Layout] = [{}]
    for name, made_of in parts.items():
        row = made_of[0][0]
        # The choice's bias is compared with float32 scores: rounded to half precision it is another one.
        entry = row.file_shape, torch.float32 if row.native.endswith("router.bias") else dtype
        if shards[-1] and total_bytes([*shards[-1].values(), entry]) > shard_bytes:
            shards.append({})
        shards[-1][name] = entry
    names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    return Plan(family, config, dict(zip(names, shards, strict=True)), parts)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shards(plan: Plan, weights: NativeWeights, folder: Path, share: tuple[int, int] = (0, 1), done: Done = int):
    """Write every n-th shard of a plan from the k-th, ``share = (k, n)``, out of a checkpoint.

    Raises:
        ConfigError: the checkpoint has other tensors than the config.
    """
    shapes = native_shapes(plan.config)
    check_checkpoint(weights, {n: s for n, s in shapes.items() if not n.endswith("router.bias")})
    layers = sorted(moe_layers(plan.config))

    @lru_cache(maxsize=1)
    def bias_LE() -> Tensor:
        return weights.bias_LE()

    @lru_cache(maxsize=3)
    def native(name: str) -> Tensor:
        if name.endswith("router.bias"):
            if name not in shapes:
                return torch.zeros(plan.config.moe.num_experts)
            return bias_LE()[layers.index(int(name.split(".")[1]))]
        return weights.read(name)

    def value(name: str) -> Tensor:
        made_of = plan.parts[name]
        out = torch.empty(made_of[0][0].file_shape, dtype=native(made_of[0][0].native).dtype)
        for row, at in made_of:
            row.store(native(row.native), at, out)
        return out

    for file in list(plan.shards)[share[0] :: share[1]]:
        write_file(folder / file, plan.shards[file], value, done)


def check_checkpoint(weights: NativeWeights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless a checkpoint holds exactly these parameters."""
    # Multi-token prediction may be left out.
    beyond = {n for n in weights.names() if n not in shapes and ".mtp_" in n}
    blocks = {n.split(".")[1] for n in beyond}
    found = {n: weights.shape(n) for n in weights.names() if n in shapes or n.split(".")[1] not in blocks}
    wrong = [n for n in {**shapes, **found} if found.get(n) != shapes.get(n)]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{weights.path}: {name} has shape {found.get(name)}, its config.toml makes it {shapes.get(name)}.",
            "Checkpoint and config.toml must be of one run.",
        )


def write_json(path: Path, content: Any) -> None:
    """Indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def appear(hidden: Path, folder: Path) -> None:
    """Rename a folder that is whole; an empty one in its place goes away."""
    if folder.is_dir():
        folder.rmdir()
    os.replace(hidden, folder)
