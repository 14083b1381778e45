"""Values of a TOML or of the command line → Config, strictly: every wrong key, type or choice is a ConfigError."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_dtensor.config.arrays import override_array, take_arrays
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import Field, all_fields, is_array, tables
from moe_dtensor.config.values import parse_text, show_value, typed_value


def build(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A Config from nested tables (``{"model": {"dim": 64}}``), on top of ``base`` (default: the defaults).

    Raises:
        ConfigError: an unknown table or key, a wrong type, or a value outside the choices.
    """
    changed = {}
    config = base or Config()
    config, values = take_arrays(config, values)
    for table, content in values.items():
        if table not in tables():
            raise _unknown_table(table, content)
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{table} = {show_value(content)}: {table} is a table.", f"Write [{table}], then its keys."
            )
        content = _by_layer(table, content)
        typed = {key: typed_value(find_field(f"{table}.{key}"), value) for key, value in content.items()}
        changed[table] = replace(getattr(config, table), **typed)
    return replace(config, **changed)


def _by_layer(table: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A list given for ``moe.top_k`` or ``moe.router`` is that of the blocks; one value given for it is that of all."""
    if table != "moe":
        return content
    changed = dict(content)
    for key in ("top_k", "router"):
        value, name = content.get(key), f"{key}_by_layer"
        if isinstance(value, str) and "," in value:
            value = parse_text(find_field(f"moe.{name}"), value)
        if isinstance(value, list | tuple) and value:
            pattern = typed_value(find_field(f"moe.{name}"), value)
            changed |= {key: max(pattern) if key == "top_k" else pattern[0], name: pattern}
        elif value is not None:
            changed.setdefault(name, ())
    return changed


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with fields replaced by ``table.key``: typed values, or text as on the command line.

    Raises:
        ConfigError: as :func:`build`.
    """
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if is_array(key):
            config = override_array(config, key, value)
            continue
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


def _unknown_table(table: str, content: Any) -> ConfigError:
    if not isinstance(content, Mapping):
        owners = [key for key in all_fields() if key.endswith(f".{table}")]
        remedy = f"Did you mean {' or '.join(owners)}?" if owners else "Every key belongs under a [table]."
        return ConfigError(f"{table} = {show_value(content)} stands outside any table.", remedy)
    near = difflib.get_close_matches(table, tables(), n=1)
    remedy = f"Did you mean [{near[0]}]?" if near else f"Tables: {', '.join(tables())}."
    return ConfigError(f"[{table}]: no such table.", remedy)
