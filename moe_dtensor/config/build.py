"""Values of a TOML or of the command line → Config, strictly: every wrong key, type or choice is a ConfigError."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import Field, all_fields, show, tables


def build(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A Config from nested tables (``{"model": {"dim": 64}}``), on top of ``base`` (default: the defaults).

    Raises:
        ConfigError: an unknown table or key, a wrong type, or a value outside the choices.
    """
    changed = {}
    config = base or Config()
    for table, content in values.items():
        if table not in tables():
            raise _unknown_table(table, content)
        if not isinstance(content, Mapping):
            raise ConfigError(f"{table} = {_show(content)}: {table} is a table.", f"Write [{table}], then its keys.")
        typed = {key: typed_value(find_field(f"{table}.{key}"), value) for key, value in content.items()}
        changed[table] = replace(getattr(config, table), **typed)
    return replace(config, **changed)


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with fields replaced by ``table.key``: typed values, or text as on the command line.

    Raises:
        ConfigError: as :func:`build`.
    """
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        field = find_field(key)
        nested.setdefault(field.table, {})[field.name] = parse_text(field, value) if isinstance(value, str) else value
    return build(nested, config)


def find_field(key: str) -> Field:
    """The field called ``table.name``; the error for an unknown one suggests the nearest."""
    field = all_fields().get(key)
    if field:
        return field
    table, _, name = key.partition(".")
    if table not in tables():
        raise _unknown_table(table, {name: None})
    members = tables()[table].fields
    owners = [k for k in all_fields() if k.endswith(f".{name}")]
    near = owners or [f"{table}.{n}" for n in difflib.get_close_matches(name, members, n=1)]
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"[{table}] has: {', '.join(members)}."
    raise ConfigError(f"{key}: no such key in [{table}].", remedy)


def parse_text(field: Field, text: str) -> Any:
    """Read a command-line value by the field's type; text that does not parse is left for :func:`typed_value`."""
    word = text.strip()
    try:
        if field.type is bool:
            return {"true": True, "false": False}.get(word.lower(), text)
        if field.type is int or field.type is float:
            return field.type(word)
        if field.item:
            read = field.item if field.item in (int, float) else lambda part: part.strip("'\"")
            return tuple(read(part.strip()) for part in word.strip("[]()").split(",") if part.strip())
    except ValueError:
        pass
    return text


def typed_value(field: Field, value: Any) -> Any:
    """``value`` if it has the field's type; integers serve as numbers, lists as tuples."""
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
            f"{field.key} = {_show(value)} is not among its choices.", f"{guess}Choices: {field.expects}."
        )
    if field.type is float and type(value) is int:
        return float(value)
    if type(value) is field.type and not (field.type is float and math.isnan(value)):
        return value
    remedy = f"Give {field.key} {field.expects}, such as {show(field.default)}."
    raise ConfigError(f"{field.key} = {_show(value)} has the wrong type: it takes {field.expects}.", remedy)


def _fits(kind: type, value: Any) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _unknown_table(table: str, content: Any) -> ConfigError:
    if not isinstance(content, Mapping):
        owners = [key for key in all_fields() if key.endswith(f".{table}")]
        remedy = f"Did you mean {' or '.join(owners)}?" if owners else "Every key belongs under a [table]."
        return ConfigError(f"{table} = {_show(content)} stands outside any table.", remedy)
    near = difflib.get_close_matches(table, tables(), n=1)
    remedy = f"Did you mean [{near[0]}]?" if near else f"Tables: {', '.join(tables())}."
    return ConfigError(f"[{table}]: no such table.", remedy)


def _show(value: Any) -> str:
    return show(value) if isinstance(value, bool | int | float | str | list | tuple) else f"a {type(value).__name__}"
