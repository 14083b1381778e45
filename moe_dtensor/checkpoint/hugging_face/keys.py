"""Kinds of facts that a config.json states, each read and written one way for all families. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_dtensor.checkpoint.hugging_face.table import REQUIRED, Function, Raw, put


@dataclass(frozen=True)
class Same:
    """The same value here and there.

    Args:
        native: our key.
        hf: names in config.json; any is read, all are written.
        default: what absence (or null) means there.
    """

    native: str
    hf: str | tuple[str, ...]
    default: Any = REQUIRED

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def read(self, raw: Raw, function: Function) -> None:
        """Any of the names; numbers become what our key holds."""
        value = raw.take(self.names, self.default)
        like = function[self.native]
        if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(like):
            raw.refuse(self.names[0], value, f"{self.native} takes {type(like).__name__} values")
        function[self.native] = value

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Under all names."""
        for name in self.names:
            put(raw, name, function[self.native])


@dataclass(frozen=True)
class Fixed:
    """A fact with one value that we can express; no key of ours.

    Args:
        hf: name in config.json.
        value: written, and accepted.
        also: accepted too. Absence always is: it must mean ``value``, or be in ``also`` as None.
        why: what another value would ask for.
    """

    hf: str
    value: Any
    also: Sequence[Any] = ()
    absent: Any = None

    def read(self, raw: Raw, function: Function) -> None:
        """Refuse any other value."""
        found = raw.take((self.hf,), self.absent if self.absent is not None else self.value)
        if found not in (self.value, *self.also):
            raw.refuse(self.hf, found, f"only {self.value!r} can be expressed")

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """The value."""
        put(raw, self.hf, self.value)


@dataclass(frozen=True)
class Implied:
    """A value of ours that all of the family have and config.json does not mention.

    Args:
        also: values that are exported as well, because they compute the same there.
    """

    native: str
    value: Any
    also: Sequence[Any] = ()

    def read(self, raw: Raw, function: Function) -> None:
        """Set it."""
        function[self.native] = self.value

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Nothing: :func:`.translate.unexpressed` compares."""


@dataclass(frozen=True)
class Choice:
    """A value of ours by a word (or flag) of theirs."""

    native: str
    hf: str
    values: tuple[tuple[Any, Any], ...]
    """(theirs, ours), the first pair is what absence means."""

    def read(self, raw: Raw, function: Function) -> None:
        """Refuse a word that is not among them."""
        found = raw.take((self.hf,), self.values[0][0])
        for theirs, ours in self.values:
            if found == theirs:
                function[self.native] = ours
                return
        raw.refuse(self.hf, found, f"it must be one of {', '.join(repr(theirs) for theirs, _ in self.values)}")

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """The word for our value; left out if there is none."""
        for theirs, ours in self.values:
            if function[self.native] == ours:
                put(raw, self.hf, theirs)


@dataclass(frozen=True)
class HeadDim:
    """``head_dim``; null or absent: width over heads, or what the class takes. Always written."""

    default: int | None = None

    def read(self, raw: Raw, function: Function) -> None:
        """After width and heads."""
        even = function["model.dim"] // function["model.num_heads"]
        function["model.head_dim"] = raw.take(("head_dim",), self.default or even)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Always: with null some of transformers' rope functions fail."""
        put(raw, "head_dim", function["model.head_dim"])


@dataclass(frozen=True)
class EvenHeads:
    """For classes without ``head_dim``: it is width over heads."""

    def read(self, raw: Raw, function: Function) -> None:
        """After width and heads; some files state it all the same."""
        even = function["model.dim"] // function["model.num_heads"]
        found = raw.take(("head_dim",), even)
        if found != even:
            raw.refuse("head_dim", found, f"this class takes hidden_size / num_attention_heads = {even}")
        function["model.head_dim"] = even

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """The same value: readers of other classes' files ask for it."""
        put(raw, "head_dim", function["model.head_dim"])


@dataclass(frozen=True)
class KeyValueHeads:
    """Key/value heads; absent: as many as query heads, or what the class takes."""

    hf: str = "num_key_value_heads"
    default: int | None = None

    def read(self, raw: Raw, function: Function) -> None:
        """After the query heads. Null is as many as query heads, whatever the class takes where it is absent."""
        whole = function["model.num_heads"]
        absent = whole if self.default is None or raw.has(self.hf) else self.default
        function["model.num_kv_heads"] = raw.take((self.hf,), absent)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """As a number."""
        put(raw, self.hf, function["model.num_kv_heads"])


@dataclass(frozen=True)
class Ahead:
    """Blocks beyond the last that predict further tokens. A folder that states them and does not hold them has none
    (:class:`.source.HuggingFaceSource`)."""

    hf: str = "num_nextn_predict_layers"

    def read(self, raw: Raw, function: Function) -> None:
        """Absent or null: none."""
        function["model.mtp_depth"] = raw.take((self.hf,), 0)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """As a number."""
        put(raw, self.hf, function["model.mtp_depth"])


@dataclass(frozen=True)
class NoGroups:
    """For classes without grouped queries: key/value heads are as many as query heads. After these."""

    def read(self, raw: Raw, function: Function) -> None:
        """Some files state it all the same."""
        heads = function["model.num_heads"]
        found = raw.take(("num_key_value_heads",), heads)
        if found != heads:
            raw.refuse("num_key_value_heads", found, f"this class has as many as query heads, {heads}")
        function["model.num_kv_heads"] = heads

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Nothing says so; fewer show when it is read back."""


@dataclass(frozen=True)
class Inverse:
    """A factor here, a divisor there."""

    native: str
    hf: str

    def read(self, raw: Raw, function: Function) -> None:
        """Absent: 1."""
        function[self.native] = 1.0 / float(raw.take((self.hf,), 1.0))

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """To 15 digits, so that 6 comes back as 6."""
        put(raw, self.hf, float(f"{1.0 / function[self.native]:.15g}"))


@dataclass(frozen=True)
class Unused:
    """A key that config.json may have and the class does not look at."""

    hf: str

    def read(self, raw: Raw, function: Function) -> None:
        """Known is all."""
        raw.take((self.hf,), None)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class AttentionScale:
    """What scores of attention are multiplied by; here 0 stands for head_dim^-1/2. After the heads' width."""

    hf: str
    default: float = 1.0

    def read(self, raw: Raw, function: Function) -> None:
        """As 0 where it is the usual one."""
        value = float(raw.take((self.hf,), self.default))
        usual = math.isclose(value, function["model.head_dim"] ** -0.5, rel_tol=1e-14)
        function["model.attention_scale"] = 0.0 if usual else value

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """As a number."""
        put(raw, self.hf, function["model.attention_scale"] or function["model.head_dim"] ** -0.5)


@dataclass(frozen=True)
class Clip:
    """Queries, keys and values are cut at this.

    Args:
        none: what stands for no clip. DBRX's class cannot do without one, so there it is one that nothing reaches.
    """

    hf: str
    none: float | None = None

    def read(self, raw: Raw, function: Function) -> None:
        """None as 0."""
        value = raw.take((self.hf,), self.none)
        function["model.clip_qkv"] = 0.0 if value is None or value == self.none else float(value)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """0 as what stands for none."""
        put(raw, self.hf, function["model.clip_qkv"] or self.none)


@dataclass(frozen=True)
class RootScale:
    """A factor that is the root of the width where a flag says so, else 1. After the width."""

    native: str
    hf: str

    def read(self, raw: Raw, function: Function) -> None:
        """By the flag."""
        function[self.native] = math.sqrt(function["model.dim"]) if raw.take((self.hf,), False) else 1.0

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Whether there is a factor; another one shows when it is read back."""
        put(raw, self.hf, function[self.native] != 1.0)
