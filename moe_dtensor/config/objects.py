"""A user's own part, by ``package.module:Name``. Loads no torch by itself."""

from __future__ import annotations

import importlib
from typing import Any

from moe_dtensor.config.errors import ConfigError


def load_object(key: str, name: str) -> Any:
    """The object that ``name`` = ``package.module:Name`` names, for the config key ``key``.

    Raises:
        ConfigError: the module cannot be imported or has no such object.
    """
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key} = {name!r} must name an object as package.module:Name; {error}.",
            "Check the spelling, and that the module can be imported from here (PYTHONPATH).",
        ) from error
