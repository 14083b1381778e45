"""What a family's table is made of: its config.json against our keys, its tensors against ours. Data only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_dtensor.checkpoint.hugging_face.function import Function


class Key(Protocol):
    """One fact that config.json and our config both state; :mod:`.keys` has the kinds there are."""

    def read(self, raw: Any, function: Function) -> None:
        """Take the fact out of config.json (a :class:`.config_json.Raw`) into ``function``."""

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
    """Of axes whose entries lie in another order in the file: which one (:func:`.axes.file_order`)."""
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
