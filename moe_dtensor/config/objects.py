"""A user's own part, by ``package.module:Name``. Loads no torch by itself."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from moe_dtensor.config.errors import ConfigError

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
