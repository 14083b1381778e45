"""A Hugging Face folder of a checkpoint: shards planned from names and sizes and written tensor by tensor, config.json,
and the files that tell text from ids.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.rows import Row, build_rows, copied, native_shapes
from moe_dtensor.checkpoint.hugging_face.safetensors_files import INDEX, SINGLE, total_bytes, write_file
from moe_dtensor.checkpoint.hugging_face.table import Family
from moe_dtensor.checkpoint.hugging_face.translate import choose_family, holds_mtp, write_config
from moe_dtensor.checkpoint.native import NativeWeights
from moe_dtensor.checkpoint.proof import copy_proof
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.data.tokenizer import ByteTokenizer, build_tokenizer, files_beside

SHARD_BYTES = 5 * 10**9
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Done = Callable[[int], Any]
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
END = "<|end|>"


class Export:
    """What a Hugging Face folder of a checkpoint will be, planned and checked before anything is written.

    Args:
        config: resolved, with the vocabulary's size.
        checkpoint: a whole one.
        dtype: of the weights; None: ``training.param_dtype``.
    """

    def __init__(self, config: Config, checkpoint: Path, dtype: str | None = None, architecture: str = "auto") -> None:
        if not config.model.vocab_size:
            raise ConfigError("model.vocab_size = 0: the size of the vocabulary is not known.", "Set it to the run's.")
        self.config, self.checkpoint = config, checkpoint
        self.dtype = dtype or config.training.param_dtype
        family = choose_family(config, architecture)
        self.left_out = config.model.mtp_depth if not holds_mtp(family) else 0
        if self.left_out:
            config = self.config = replace(config, model=replace(config.model, mtp_depth=0))
        self.config_json = write_config(family, config, self.dtype)
        self.plan: Plan = plan_export(family, config, getattr(torch, self.dtype))

    def write_shards(self, folder: Path, share: tuple[int, int], done: Done = int) -> None:
        """Every n-th shard from the k-th, ``share = (k, n)``.

        Raises:
            ConfigError: the checkpoint has other tensors than the config.
        """
        plan, config, weights = self.plan, self.config, NativeWeights(self.checkpoint)
        shapes = native_shapes(config)
        check_checkpoint(weights, {n: s for n, s in shapes.items() if not n.endswith("router.bias")})
        layers = sorted(moe_layers(config))

        @lru_cache(maxsize=1)
        def bias_LE() -> Tensor:
            return weights.bias_LE()

        @lru_cache(maxsize=3)
        def native(name: str) -> Tensor:
            if name.endswith("router.bias"):
                if name not in shapes:
                    return torch.zeros(config.moe.num_experts)
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

    def write_rest(self, folder: Path) -> None:
        """Index, tokenizer, config.json, and the checkpoint's proof."""
        self.plan.write_index(folder)
        copy_proof(self.checkpoint, folder)
        tokens = write_tokenizer(self.config.data.tokenizer, self.config.model.vocab_size, folder)
        if self.config.data.chat_template:
            shutil.copyfile(Path(self.config.data.chat_template).expanduser(), folder / "chat_template.jinja")
        write_json(folder / "config.json", self.config_json | tokens)


@dataclass(frozen=True)
class Plan:
    """What an export writes: file tensors by shard, and how each comes from ours."""

    family: Family
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
    return Plan(family, dict(zip(names, shards, strict=True)), parts)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


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


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy what there is, unchanged; whether there is a tokenizer.json."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return (folder / "tokenizer.json").is_file()


def write_tokenizer(name: str, vocab_size: int, folder: Path) -> dict[str, Any]:
    """The tokenizer files of ``data.tokenizer`` and a generation_config.json; none for a vocabulary smaller than bytes.

    Returns:
        What config.json says of special tokens: null where there is none, for a class may have defaults of its own.
    """
    if name == "bytes" and vocab_size < ByteTokenizer.vocab_size:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if name == "bytes":
        _write_bytes(folder)
        tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": ByteTokenizer.end_id, "pad_token_id": None}
    else:
        file = Path(os.path.expanduser(name))
        copy_tokenizer(files_beside(name), folder)
        if file.is_file():
            shutil.copyfile(file, folder / "tokenizer.json")
        tokens = {"bos_token_id": None, "eos_token_id": build_tokenizer(name).end_id, "pad_token_id": None}
        _write_class(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        stated = json.loads(generation.read_text(encoding="utf-8"))
        return tokens | {key: stated[key] for key in tokens if key in stated}
    write_json(generation, {"_from_model_config": True} | tokens)
    return tokens


def _write_class(folder: Path) -> None:
    """A tokenizer_config.json where there is none; a class that only transformers 5 knows becomes one that 4 knows."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if content.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        write_json(path, content | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_bytes(folder: Path) -> None:
    """256 byte letters without merges, and the end token: ids are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    library = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    library.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
        },
    )


def _byte_letters() -> list[str]:
    """The letter that GPT-2's byte-level alphabet writes for each byte: itself if seen, else the next from 256."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
