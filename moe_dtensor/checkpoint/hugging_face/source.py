"""A Hugging Face folder as a source of our tensors, read slice by slice. E experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.rows import (
    Range,
    Row,
    build_rows,
    copied,
    file_shapes,
    is_extra,
    native_shapes,
)
from moe_dtensor.checkpoint.hugging_face.safetensors_files import DTYPES, Shards, some
from moe_dtensor.checkpoint.hugging_face.translate import Described, config_of, differing, function_of, read_config
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import show


class HuggingFaceSource:
    """Our tensors out of a folder's files, every one accounted for before any is read.

    Args:
        folder: with config.json and shards.
        config: resolved; what it computes must be what the folder's config.json says, see
            :func:`.same_function_problems`. None: the folder's own.

    Raises:
        ConfigError: what :func:`.translate.read_config` or :class:`.safetensors_files.Shards` refuses; a tensor of the
            model that the files lack, one of theirs that has no place, or one of another shape.
    """

    def __init__(self, folder: str | Path, config: Config | None = None) -> None:
        self.folder = Path(folder)
        described = read_config(folder)
        self.shards = Shards(folder)
        self.described: Described = _as_held(described, self.shards)
        self.written_config = config_of(self.described)
        """As a TOML would have it."""
        self.own_config = resolve(self.written_config, 1)
        self.config = config or self.own_config
        self.shards.refuse_quantized()
        # Laid out as the folder is; the config may have untied its head, or given a bias to the choice.
        self.rows = build_rows(self.described.family, self.own_config)
        self._account()
        if self.own_config.model.tie_embeddings and not self.config.model.tie_embeddings:
            embedding = self.rows["tok_embeddings.weight"]
            self.rows["output.weight"] = replace(embedding, native="output.weight")
        self.shapes = native_shapes(self.config)

    def read(self, name: str, held: Sequence[Range], out: Tensor) -> None:
        """Fill ``out`` with a slice of our tensor ``name``.

        Args:
            held: from where to where along each dimension of the full tensor.
            out: of the slice's shape, any dtype; padded rows become 0.
        """
        row = self.rows.get(name)
        if row is None or "v" in row.sizes:
            out.zero_()
        if row is None:
            return  # a bias that starts at 0
        needed = row.needed(held)
        for file, at in row.files(held):
            row.place(self.shards.read(file, needed), at, held, out)

    def dtype(self, name: str) -> torch.dtype:
        """That our tensor has in the files; half precision of the other kind widens to float32, which holds it."""
        row = self.rows.get(name)
        if row is None:
            return torch.float32
        dtype = DTYPES[self.shards.entry(next(row.files())[0]).dtype]
        return torch.float32 if dtype == torch.float16 else dtype

    def _account(self) -> None:
        wanted = file_shapes(self.rows)
        family = self.described.family
        missing = [name for name in wanted if name not in self.shards]
        if missing:
            raise ConfigError(
                f"{self.folder} lacks {some(missing)}, which {family.model_type} with this config.json has.",
                "Fetch the shards again, or correct config.json.",
            )
        unused = [
            name for name in self.shards.names() if name not in wanted and not is_extra(name, family, self.own_config)
        ]
        if unused:
            raise ConfigError(
                f"{self.folder} holds {some(unused)}; {family.model_type} with this config.json has no place for it.",
                "Correct config.json (number of experts, of blocks, biases); nothing may be left unused.",
            )
        for name, shape in wanted.items():
            if self.shards.entry(name).shape != shape:
                raise ConfigError(
                    f"{self.folder}: {name} has shape {list(self.shards.entry(name).shape)}; "
                    f"config.json makes it {list(shape)}.",
                    "Correct config.json, or fetch the shards again.",
                )
        self._check_copies()

    def _check_copies(self) -> None:
        """Modules for further tokens share embedding and head here, so copies of them must be such: the first and last
        rows are looked at."""
        for name, original in copied(self.described.family, self.own_config, self.rows).items():
            if name not in self.shards:
                continue
            shape = self.shards.entry(original).shape
            ends = [[(0, min(16, shape[0])), (0, shape[1])], [(max(0, shape[0] - 16), shape[0]), (0, shape[1])]]
            same = self.shards.entry(name).shape == shape and all(
                torch.equal(self.shards.read(name, end), self.shards.read(original, end)) for end in ends
            )
            if not same:
                raise ConfigError(
                    f"{self.folder}: {name} is no copy of {original}; multi-token prediction shares it here.",
                    "Set num_nextn_predict_layers = 0 in config.json to leave these modules out.",
                )


def _as_held(described: Described, shards: Shards) -> Described:
    """Without multi-token prediction where the files have none of its first block: transformers drops it, and the key
    stays."""
    blocks = described.function["model.num_layers"]
    prefix = f"model.layers.{blocks}."
    if not described.function["model.mtp_depth"] or any(name.startswith(prefix) for name in shards.names()):
        return described
    return replace(described, function=described.function | {"model.mtp_depth": 0})


def whole(row_or_shape: Row | Sequence[int]) -> list[Range]:
    """The ranges of a full tensor."""
    shape = row_or_shape.shape if isinstance(row_or_shape, Row) else row_or_shape
    return [(0, size) for size in shape]


def same_function_problems(run: Config, folder: Config) -> list[str]:
    """Keys in which a run computes something else than a folder's weights were made for, with both values.

    An untied head may start from a tied one, a bias of the choice from 0; multi-token prediction may be left out.
    """
    mine, theirs = function_of(run), function_of(folder)
    if theirs["model.tie_embeddings"] and not mine["model.tie_embeddings"]:
        theirs["model.tie_embeddings"] = False
    if not mine["model.mtp_depth"]:
        theirs["model.mtp_depth"] = 0  # left out
    if mine["moe.selection_bias"]:
        theirs["moe.selection_bias"] = True
    return [f"{key} = {show(theirs[key])} there, {show(mine[key])} here" for key in differing(theirs, mine)]
