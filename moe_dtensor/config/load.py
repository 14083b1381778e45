"""TOML file and command line → Config, strictly: every wrong key, type or choice is a ConfigError; and back to TOML.
Last, the parts of one's own that a config names: ``package.module:Name`` → the object. Loads no torch by itself."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import (
    Field,
    all_fields,
    arrays,
    is_array,
    parse_text,
    show,
    show_value,
    tables,
    typed_value,
)

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML, apply overrides by ``table.key``, and name the run's folder after the file if nothing else does.

    The ``config.toml`` in a run's folder means the run there, from wherever it is named and wherever it was moved.

    Raises:
        ConfigError: the file is missing or no TOML, or a key, type or choice is wrong.
    """
    path = Path(path)
    config = override(build(_read(path)), overrides or {})
    if path.name == "config.toml" and (path.parent / "run.json").exists() and "run.folder" not in (overrides or {}):
        config = replace(config, run=replace(config.run, folder=str(path.parent)))
    if not config.run.folder:
        config = replace(config, run=replace(config.run, folder=f"outputs/{path.stem}"))
    return config


def load_variants(path: str | Path, config: Config) -> dict[str, Config]:
    """Named variants of a config: a TOML with a table for each, such as ``[tp2]`` and in it ``mesh.tp = 2``.

    Raises:
        ConfigError: as :func:`load`, or the file names none.
    """
    content = _read(Path(path))
    remedy = "Write [name of a variant], then table.key = value lines."
    for name, changes in content.items():
        if not isinstance(changes, dict):
            raise ConfigError(f"{path}: {name} is no table.", remedy)
    if not content:
        raise ConfigError(f"{path} has no variants.", remedy)
    return {name: build(changes, config) for name, changes in content.items()}


def dump(config: Config) -> str:
    """TOML text that names every field of ``config``, of arrays of tables those that are set; :func:`load` reads it
    back equal."""
    blocks = []
    for table in tables().values():
        values = getattr(config, table.name)
        lines = [f"{name} = {show(getattr(values, name))}" for name in table.fields]
        blocks.append("\n".join([f"[{table.name}]", *lines]))
    for name, table in arrays().items():
        for entry in get_array(config, name):
            given = [key for key, field in table.fields.items() if getattr(entry, key) != field.default]
            blocks.append("\n".join([f"[[{name}]]", *(f"{key} = {show(getattr(entry, key))}" for key in given)]))
    return "\n\n".join(blocks) + "\n"


def dump_changes(config: Config) -> str:
    """TOML text of the fields that are not at their default."""
    blocks = []
    for table in tables().values():
        values = getattr(config, table.name)
        lines = [
            f"{name} = {show(getattr(values, name))}"
            for name, field in table.fields.items()
            if getattr(values, name) != field.default
        ]
        if lines:
            blocks.append("\n".join([f"[{table.name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", "Correct that line.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8.", "Give a TOML file.") from None
    except OSError as error:
        folder = path.parent
        beside = sorted(p.name for p in folder.glob("*.toml")) if folder.is_dir() else []
        remedy = f"{folder} has: {', '.join(beside)}." if beside else "The presets are in train_configs/."
        raise ConfigError(f"cannot read the config {path}: {error.strerror}.", remedy) from None


def names_object(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:Name``."""
    return _FORM.fullmatch(name) is not None


def is_pythons_own(name: str) -> bool:
    """Whether ``package.module:Name`` names something of Python's standard library, which no own part is."""
    return name.partition(":")[0].partition(".")[0] in {*sys.stdlib_module_names, "__main__", "builtins"}


def load_object(key: str, name: str, suits: Callable[[Any], bool], what: str) -> Any:
    """The object that ``name`` = ``package.module:Name`` names, for the config key ``key``.

    A config may come from someone else, so not everything that can be imported may be called by it.

    Args:
        key: of the config.
        name: its value.
        suits: whether an object can serve there; looks at it, and does not call it.
        what: what has to be named, for the error.

    Raises:
        ConfigError: the module cannot be imported, has no such object, or one that does not suit.
    """
    module_name, _, attribute = name.partition(":")
    if is_pythons_own(name):
        raise ConfigError(f"{key} = {name!r} must name {what}, not a part of Python itself.", "Name one of your own.")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{key} = {name!r} must name an object as package.module:Name; {error}.",
            "Check the spelling, and that the module can be imported from here (PYTHONPATH).",
        ) from error
    if not suits(found):
        kind = f"the class {found.__qualname__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ConfigError(f"{key} = {name!r} must name {what}; it is {kind}.", "docs/own_parts.md shows each.")
    return found
