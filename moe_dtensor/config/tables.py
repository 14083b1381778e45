"""What the schema says, as data: tables, fields, types, help texts; values by type; the reference made of it.

Errors, ``--help`` and ``docs/config.md`` all read it from here, so they cannot disagree with the schema.
``python -m moe_dtensor.config.tables > docs/config.md`` writes the latter.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import sys
import textwrap
import tomllib
import types
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moe_dtensor.config import schema
from moe_dtensor.config.errors import ConfigError

ARRAYS: dict[str, type] = {
    "data.sources": schema.Source,
    "eval.sets": schema.EvalSet,
    "stages": schema.Stage,
}
SHARES = tuple[tuple[str, float], ...]
"""Type of a field that a TOML writes as a table of numbers."""


@dataclass(frozen=True)
class Field:
    """One key of a table."""

    table: str
    name: str
    type: Any
    """``bool``, ``int``, ``float``, ``str``, a ``Literal`` of strings, or a ``tuple`` of any number of one of these."""
    default: Any
    help: str

    @property
    def key(self) -> str:
        """``table.name``, as on the command line."""
        return f"{self.table}.{self.name}"

    @property
    def item(self) -> Any:
        """The type of a list's items; None if the field is no list."""
        return get_args(self.type)[0] if get_origin(self.type) is tuple else None

    @property
    def metavar(self) -> str:
        """The type as ``--help`` writes it."""
        if self.type == SHARES:
            return "{NAME=NUMBER,...}"
        short = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}
        one = self.item or self.type
        word = "|".join(get_args(one)) if get_origin(one) is Literal else short[one]
        return f"{word},{word},..." if self.item else word

    @property
    def expects(self) -> str:
        """The type in words, for errors and help."""
        if self.type == SHARES:
            return "a table of numbers"
        one = self.item or self.type
        if get_origin(one) is Literal:
            choices = " | ".join(get_args(one))
            return f"a list of {choices}" if self.item else choices
        if self.item:
            return {int: "a list of integers", float: "a list of numbers", str: "a list of strings"}[one]
        return {bool: "true | false", int: "an integer", float: "a number", str: "a string"}[one]


@dataclass(frozen=True)
class Table:
    """One TOML table: its dataclass, what it is for, and its fields by name."""

    name: str
    type: type
    help: str
    fields: dict[str, Field]


@functools.cache
def tables() -> dict[str, Table]:
    """Every table of the config by name, in the order of the schema."""
    return {name: _table(name, cls) for name, cls in get_type_hints(schema.Config).items() if name not in ARRAYS}


@functools.cache
def arrays() -> dict[str, Table]:
    """The arrays of tables (``[[data.sources]]``, ``[[stages]]``): what one of their tables holds."""
    return {name: _table(name, cls) for name, cls in ARRAYS.items()}


def is_array(key: str) -> bool:
    """Whether a key names an array of tables, or something in one."""
    return any(key == name or key.startswith(f"{name}.") for name in ARRAYS)


@functools.cache
def _class_nodes(module: str) -> dict[str, ast.ClassDef]:
    source = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}


def _table(name: str, cls: type) -> Table:
    node = _class_nodes(cls.__module__)[cls.__name__]
    helps, hints = _field_docs(node), get_type_hints(cls)
    members = {
        f.name: Field(name, f.name, hints[f.name], f.default, helps.get(f.name, ""))
        for f in fields(cls)
        if f"{name}.{f.name}" not in ARRAYS
    }
    return Table(name, cls, ast.get_docstring(node) or "", members)


@functools.cache
def all_fields() -> dict[str, Field]:
    """Every field of the config by ``table.name``."""
    return {field.key: field for table in tables().values() for field in table.fields.values()}


def show(value: Any) -> str:
    """A field's value as TOML writes it."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + "".join(_ESCAPES.get(c, c) for c in value) + '"'
        case tuple() if value and all(isinstance(item, tuple) for item in value):
            return "{" + ", ".join(f"{show(name)} = {show(number)}" for name, number in value) + "}"
        case tuple() | list():
            return "[" + ", ".join(show(item) for item in value) + "]"
    return repr(value)


_ESCAPES: types.MappingProxyType[str, str] = types.MappingProxyType(
    {chr(code): f"\\u{code:04x}" for code in (*range(32), 127)} | {'"': '\\"', "\\": "\\\\"}
)


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    """The string that follows each annotated field of a class, white space joined."""
    docs = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


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


HEADER = """# Config reference

One TOML table per heading; a TOML names only what it changes. Every key can be overridden on the command line:
`--table.key value`. Generated by `python -m moe_dtensor.config.tables > docs/config.md`; do not edit.
"""


def help_text() -> str:
    """Every override, grouped by table, wrapped to 100 columns."""
    lines = ["overrides (--table.key value; defaults in brackets):"]
    for table in tables().values():
        lines += ["", f"[{table.name}] {table.help}"]
        for field in table.fields.values():
            lines.append(f"  --{field.key} {field.metavar}  [{show(field.default)}]")
            lines += textwrap.wrap(field.help.replace("``", ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for table in arrays().values():
        which = "NAME" if "name" in table.fields else "N"
        lines += ["", f"[[{table.name}]] {table.help}"]
        for field in table.fields.values():
            lines.append(f"  --{table.name}.{which}.{field.name} {field.metavar}  [{show(field.default)}]")
            lines += textwrap.wrap(field.help.replace("``", ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """The text of ``docs/config.md``."""
    lines = [HEADER]
    for table in (*tables().values(), *arrays().values()):
        title = f"[[{table.name}]]" if table.name in arrays() else f"[{table.name}]"
        lines += [f"## `{title}`", "", table.help, "", "| key | type | default | |", "|---|---|---|---|"]
        for field in table.fields.values():
            expects = field.expects.replace("|", "\\|")
            text = field.help.replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {expects} | `{show(field.default)}` | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
