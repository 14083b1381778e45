"""Arrays of tables (``[[data.sources]]``, ``[[stages]]``): from a TOML and from the command line."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import Field, arrays
from moe_dtensor.config.values import parse_text, show_value, typed_value


def get_array(config: Config, name: str) -> tuple[Any, ...]:
    """The tables of an array."""
    return functools.reduce(getattr, name.split("."), config)  # type: ignore[arg-type]


def set_array(config: Config, name: str, entries: tuple[Any, ...]) -> Config:
    """``config`` with the tables of an array replaced."""
    outer, _, inner = name.rpartition(".")
    changed: dict[str, Any] = {inner: entries}
    return replace(config, **({outer: replace(getattr(config, outer), **changed)} if outer else changed))


def take_arrays(config: Config, values: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Build the arrays that nested tables hold; the config with them, and the tables without.

    Raises:
        ConfigError: no array of tables, an unknown key or a wrong type.
    """
    rest = dict(values)
    for name in arrays():
        outer, _, inner = name.rpartition(".")
        holder = rest if not outer else rest.get(outer)
        if not isinstance(holder, Mapping) or inner not in holder:
            continue
        config = set_array(config, name, build_entries(name, holder[inner]))
        left = {key: value for key, value in holder.items() if key != inner}
        rest = {**rest, outer: left} if outer else left
    return config, rest


def build_entries(name: str, content: Any) -> tuple[Any, ...]:
    """The tables of one array, typed."""
    if not isinstance(content, list | tuple) or not all(isinstance(entry, Mapping) for entry in content):
        raise ConfigError(
            f"{name} = {show_value(content)}: {name} is an array of tables.", f"Write [[{name}]], then its keys."
        )
    table = arrays()[name]
    return tuple(
        table.type(**{key: typed_value(find_key(name, key), value) for key, value in entry.items()})
        for entry in content
    )


def find_key(name: str, key: str) -> Field:
    """The field of an array's tables; the error for an unknown one suggests the nearest."""
    members = arrays()[name].fields
    if key in members:
        return members[key]
    near = difflib.get_close_matches(key, members, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"[[{name}]] has: {', '.join(members)}."
    raise ConfigError(f"{name}.{key}: no such key in [[{name}]].", remedy)


def override_array(config: Config, key: str, value: Any) -> Config:
    """Replace an array (``--stages '[{from_step = 9, lr = 1e-4}]'``), or a key of one of its tables: by
    its name where it has one (``--data.sources.web.weight 0.5``), a stage's by its number (``--stages.1.lr 1e-4``)."""
    name = next(name for name in arrays() if key == name or key.startswith(f"{name}."))
    entries = get_array(config, name)
    if key == name:
        return set_array(config, name, build_entries(name, parse_array(name, value)))
    which, _, member = key[len(name) + 1 :].rpartition(".")
    names = [getattr(entry, "name", str(number)) for number, entry in enumerate(entries, 1)]
    if which not in names:
        raise ConfigError(
            f"{key}: [[{name}]] has no {which!r}.",
            f"It has: {', '.join(names)}." if names else f"Write [[{name}]] into the TOML, or --{name} '[{{...}}]'.",
        )
    field = find_key(name, member)
    typed = typed_value(field, parse_text(field, value) if isinstance(value, str) else value)
    index = names.index(which)
    return set_array(
        config, name, (*entries[:index], replace(entries[index], **{member: typed}), *entries[index + 1 :])
    )


def parse_array(name: str, value: Any) -> Any:
    """An array as TOML writes it in one line."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name} = {value!r} is not valid TOML: {error}.", f"Write --{name} '[{{key = value}}]'."
        ) from None
