"""One value of a TOML or of the command line, by the type of its field."""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.tables import SHARES, Field, show


def parse_text(field: Field, text: str) -> Any:
    """Read a command-line value by the field's type; text that does not parse is left for :func:`typed_value`."""
    word = text.strip()
    try:
        if field.type is bool:
            return {"true": True, "false": False}.get(word.lower(), text)
        if field.type is int or field.type is float:
            return field.type(word)
        if field.type == SHARES:
            return tomllib.loads(f"value = {word}")["value"]
        if field.item:
            read = field.item if field.item in (int, float) else lambda part: part.strip("'\"")
            return tuple(read(part.strip()) for part in word.strip("[]()").split(",") if part.strip())
    except ValueError:
        pass
    return text


def typed_value(field: Field, value: Any) -> Any:
    """``value`` if it has the field's type; integers serve as numbers, lists as tuples."""
    if field.type == SHARES:
        return typed_shares(field, value)
    if field.item and isinstance(value, list | tuple):
        single = replace(field, type=field.item, default=(field.default or [""])[0])
        if get_origin(field.item) is Literal or all(_fits(field.item, item) for item in value):
            return tuple(typed_value(single, item) for item in value)
    if get_origin(field.type) is Literal:
        if value in get_args(field.type):
            return value
        near = difflib.get_close_matches(str(value).lower(), {c.lower(): c for c in get_args(field.type)}, n=1)
        named = [c for c in get_args(field.type) if near and c.lower() == near[0]]
        guess = f"Did you mean {show(named[0])}? " if named else ""
        raise ConfigError(
            f"{field.key} = {show_value(value)} is not among its choices.", f"{guess}Choices: {field.expects}."
        )
    if field.type is float and type(value) is int:
        return float(value)
    if type(value) is field.type and not (field.type is float and math.isnan(value)):
        return value
    remedy = f"Give {field.key} {field.expects}, such as {show(field.default)}."
    raise ConfigError(f"{field.key} = {show_value(value)} has the wrong type: it takes {field.expects}.", remedy)


def _fits(kind: type, value: Any) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def typed_shares(field: Field, value: Any) -> tuple[tuple[str, float], ...]:
    """A table of numbers as pairs."""
    pairs = value.items() if isinstance(value, dict) else value if isinstance(value, tuple) else None
    if pairs is None or any(type(number) not in (int, float) for _, number in pairs):
        raise ConfigError(
            f"{field.key} = {show_value(value)} has the wrong type: it takes {field.expects}.",
            f"Write {field.name} = {{web = 0.3, code = 0.7}}.",
        )
    return tuple((name, float(number)) for name, number in pairs)


def show_value(value: Any) -> str:
    """A value as an error tells it."""
    return show(value) if isinstance(value, bool | int | float | str | list | tuple) else f"a {type(value).__name__}"
