"""What a family's table is made of: its config.json against our keys, its tensors against ours. Loads no torch.

A key reads a config.json as :class:`Raw`, which remembers what was read, and states what it reads in a
:data:`Function`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from moe_dtensor.config.errors import ConfigError

Function = dict[str, Any]
"""What a config says about the function that its weights compute: values of ``[model]``, ``[rope]`` and ``[moe]`` by
``table.key``; ``moe.layers`` names every MoE block."""

REQUIRED = object()
"""Default of a key that must be there."""

HARMLESS = tuple(
    re.compile(pattern)
    for pattern in (
        r"_?(name_or_path|commit_hash|attn_implementation|experts_implementation)",
        r"architectures|auto_map|model_type|transformers_version|(torch_)?dtype|id2label|label2id|problem_type",
        r"(bos|eos|eod|pad|sep|unk|cls|mask|decoder_start|begin_suppress)_token_ids?",
        r"use_cache|is_encoder_decoder|is_decoder|return_dict|output_\w+|torchscript|chunk_size_feed_forward",
        r"max_position_embeddings|max_seq_len|seq_length|max_length|model_max_length|tokenizer_class",
        r"initializer_range|initializer_cutoff_factor|pretraining_tp|gradient_checkpointing",
        r"router_aux_loss_coef|aux_loss_alpha|seq_aux|router_jitter_noise|router_z_loss_coef|moe_loss_weight",
        r"moe_jitter_eps|router_dtype|ep_size|enable_moe_fp32_combine|enable_lm_head_fp32|routed_scaling_type",
        r"\w*(dropout|drop|pdrop)(_prob|_rate)?",
        r"num_nextn_predict_layers|num_mtp_(layers|modules)|mtp_\w+|mtp_loss_scaling_factor",
        r"(attn|ffn)_config\.(?!clip_qkv|rope|kv_n_heads|ffn_|moe_(num|top|norm)).*",
    )
)
"""Keys that do not change what the model computes without dropout; the rest must be known to the family's table."""


class Raw:
    """A config.json (nested names by dots). What is never taken is unknown.

    Args:
        content: of the file.
        where: its path, for errors.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where
        self.taken: set[str] = set()
        self.refused: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the key is there, null or not."""
        return _find(self.content, name)[0]

    def take(self, names: Sequence[str], default: Any = REQUIRED) -> Any:
        """Value of a key by any of its names; absent or null: the default.

        Raises:
            ConfigError: there is none and no default, or two names state different values.
        """
        self.taken |= set(names)
        found = {name: value for name in names if (value := _find(self.content, name)[1]) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ConfigError(f"{self.where}: {' and '.join(f'{k} = {v!r}' for k, v in found.items())} differ.")
        if values:
            return values[0]
        if default is REQUIRED:
            raise ConfigError(f"{self.where}: {' or '.join(names)} is missing.", "Give a whole config.json.")
        return default

    def refuse(self, name: str, value: Any, why: str) -> None:
        """Note that a value cannot be expressed; :meth:`check` tells of all together."""
        self.refused.append(f"{name} = {value!r} ({why})")

    def check(self) -> None:
        """Raise for what cannot be expressed, and for keys that nobody has looked at."""
        names = list(_names(self.content))
        unknown = [
            f"{name} = {_find(self.content, name)[1]!r} (not known)"
            for name in names
            if name not in self.taken
            and not any(p.fullmatch(name) for p in HARMLESS)
            and _find(self.content, name)[1] not in (None, False)
        ]
        if self.refused or unknown:
            raise ConfigError(
                f"{self.where} asks for what this program's config cannot express: "
                + "; ".join([*self.refused, *unknown])
                + ".",
                "A key that does not change what the model computes may be taken out of config.json.",
            )

    def fail(self, problem: str, remedy: str = "") -> NoReturn:
        """Raise at once, with the file's name."""
        raise ConfigError(f"{self.where}: {problem}", remedy)


def put(raw: dict[str, Any], name: str, value: Any) -> None:
    """Set a key, nested by dots."""
    *path, last = name.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
    raw[last] = value


def _find(content: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _names(content: Mapping[str, Any]) -> list[str]:
    """Top-level names; those inside a nested config one by one."""
    names = []
    for key, value in content.items():
        nested = isinstance(value, Mapping) and key.endswith("_config")
        names += [f"{key}.{inner}" for inner in value] if nested else [key]
    return names


class Key(Protocol):
    """One fact that config.json and our config both state; :mod:`.keys` has the kinds there are."""

    def read(self, raw: Raw, function: Function) -> None:
        """Take the fact out of config.json into ``function``."""

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """State the fact in ``raw``, the config.json to be; nested by dots in the name."""


@dataclass(frozen=True)
class Tensor:
    """Where one of our tensors, or a part of it, lies in published files.

    Axes are letters. ``axes`` names those of our tensor, ``layout`` those of a file tensor; ``(h c)`` is one dimension
    made of two axes, the first the slower. Sizes: h query heads, k key/value heads, c head width, two 2, v vocabulary
    rows (padded here, cut in files); all others follow from our shape. An axis of ours that the layout lacks is in the
    file's name, ``{e}`` a number, any other one of ``words``.

    Rows of a table that name the same file tensor lie in it one after another along its first dimension, in the order
    of the table.
    """

    native: str
    """Our name; ``{i}`` is the block."""
    axes: str
    file: str
    """Name in the files; ``{i}`` is the block."""
    layout: str = ""
    """Empty: ``axes`` without those in the file's name."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of axes in the file's name that are no numbers: what stands there for 0, 1, …"""
    order: Mapping[str, str] = field(default_factory=dict)
    """Of axes whose entries lie in another order in the file: which one (:func:`.rows.file_order`)."""
    fixed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Axes that only the layout has: (index of this part, size)."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    model_type: str
    architecture: str
    """Class in transformers."""
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    published: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values, of keys that the class could hold otherwise, that published checkpoints have. Engines take them for
    granted, so nothing else is exported."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says beside, in export."""
    packed_as: tuple[str, ...] = ()
    """Kinds of ``quantization_config`` that are read as the numbers that they stand for."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Our tensors of which a block beyond the last (multi-token prediction) has a copy: its name in the files."""
    extras: tuple[str, ...] = ()
    """Regular expressions of file tensors that may be left unused."""
