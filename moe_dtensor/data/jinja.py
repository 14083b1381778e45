"""The Jinja that chat templates are written in: what transformers offers to them. Needs jinja2."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: puts ``generation_marks`` around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of :meth:`mark` with what is inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """What is inside, between the marks."""
        marks: Any = self.environment.globals.get("generation_marks", ("", ""))
        return f"{marks[0]}{caller()}{marks[1]}"


def build_environment(strftime_now: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    """A sandbox with the filters and functions that templates rely on.

    Args:
        strftime_now: the date in a form.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    known = {key: options[key] for key in ("ensure_ascii", "separators", "sort_keys") if key in options}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **known})


def refuse(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)
