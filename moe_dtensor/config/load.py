"""TOML file + overrides → Config, and back to TOML text."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dtensor.config.arrays import get_array
from moe_dtensor.config.build import build, override
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import arrays, show, tables


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
