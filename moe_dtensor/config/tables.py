"""What the schema says, as data: the tables, their fields, types, defaults and help texts.

Errors, ``--help`` and ``docs/config.md`` all read it from here, so they cannot disagree with the schema.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moe_dtensor.config import schema

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
