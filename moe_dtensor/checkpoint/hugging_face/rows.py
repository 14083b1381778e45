"""A family's table applied to one model: every tensor of ours and of the files accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moe_dtensor.checkpoint.hugging_face.axes import Row, axis_sizes
from moe_dtensor.checkpoint.hugging_face.function import Function, function_of, has_selection_bias
from moe_dtensor.checkpoint.hugging_face.table import Family
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer

EXTRAS = (
    r".*rotary_emb\.inv_freq",
    r".*\.attention\.(masked_)?bias",
    r"(model\.)?mtp(_\w+)?\..*",
    r"model\.mtp_.*",
)
"""File tensors of any family that may be left unused: tables that are computed, modules for predicting further."""


def native_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of a resolved config, and of the biases that the choice sees, by name."""
    with torch.device("meta"):
        model = Transformer(config, range(config.model.num_layers + config.model.mtp_depth))
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    if has_selection_bias(config):
        for layer in sorted(moe_layers(config)):
            shapes[f"layers.{layer}.moe.router.bias"] = (config.moe.num_experts,)
    return shapes


def build_rows(family: Family, config: Config, always: Sequence[str] = ()) -> dict[str, Row]:
    """Rows of the table by our name: each of our tensors by exactly one entry, which may be open in block and expert.

    Args:
        config: resolved, with the vocabulary's size.
        always: names that get a row though the model has no such tensor (a bias of zeros).

    Raises:
        ValueError: a tensor of ours matches no entry, or more than one: the table is wrong.
    """
    function = function_of(config)
    shapes = native_shapes(config)
    if config.model.tie_embeddings:
        shapes.pop("output.weight", None)
    shapes |= {name: (config.moe.num_experts,) for name in always if name not in shapes}
    rows = {name: _row(family, function, name, shape) for name, shape in shapes.items()}
    return _stacked(family, rows)


def _row(family: Family, function: Function, name: str, shape: tuple[int, ...]) -> Row:
    block = re.match(r"layers\.(\d+)\.", name)
    short = name if block is None else f"layers.{{i}}.{name[block.end() :]}"
    entries = [entry for entry in family.tensors if entry.native == short]
    if len(entries) != 1:
        raise ValueError(f"{name} has {len(entries)} entries in the table of {family.model_type}; it needs one.")
    entry = entries[0]
    file = entry.file if block is None else entry.file.replace("{i}", block[1])
    return Row(entry, name, file, shape, axis_sizes(entry, shape, function), function["model.rope_dim"])


def _stacked(family: Family, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Rows that share a file tensor begin where the one before ends, in the order of the table."""
    order = {id(entry): number for number, entry in enumerate(family.tensors)}
    together: dict[str, list[Row]] = {}
    for row in rows.values():
        together.setdefault(row.file, []).append(row)
    placed: dict[str, Row] = {}
    for group in together.values():
        group.sort(key=lambda row: order[id(row.entry)])
        if len(group) > 1 and not any(row.entry.fixed for row in group):
            whole, start = sum(row.part_shape[0] for row in group), 0
            for number, row in enumerate(group):
                group[number] = replace(row, start=start, whole=whole)
                start += row.part_shape[0]
        placed |= {row.native: row for row in group}
    return {name: placed[name] for name in rows}


def file_shapes(rows: Mapping[str, Row]) -> dict[str, tuple[int, ...]]:
    """Shape of every file tensor that the rows speak of, in our order."""
    return {name: row.file_shape for row in rows.values() for name, _ in row.files()}


def copied(family: Family, config: Config, rows: Mapping[str, Row]) -> dict[str, str]:
    """File tensors that repeat another one, which multi-token prediction shares, by their name: the other's name."""
    blocks = range(config.model.num_layers, config.model.num_layers + config.model.mtp_depth)
    return {
        file.replace("{i}", str(block)): rows[native].file
        for block in blocks
        for native, file in family.copies.items()
        if native in rows
    }


def is_extra(name: str, family: Family, config: Config) -> bool:
    """Whether a file tensor may be left unused: a computed table, a module beyond the last block, a tied head."""
    block = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    if block and int(block[1]) >= config.model.num_layers:
        ahead = int(block[1]) < config.model.num_layers + config.model.mtp_depth
        return not ahead or name in [file.replace("{i}", block[1]) for file in family.copies.values()]
    if config.model.tie_embeddings and name == "lm_head.weight":
        return True
    return any(re.fullmatch(pattern, name) for pattern in (*EXTRAS, *family.extras))
