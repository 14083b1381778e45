"""What every verb's command line shares: ``--config F``, ``--table.key value``, and the file of ``--json``."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import all_fields, help_text, is_array


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON in UTF-8; the folder is made, and the file is there as a whole or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Parser(argparse.ArgumentParser):
    """An argparse parser with ``--config``, the overrides in its ``--help``, and ConfigError for a wrong command line.

    Add a verb's own options with ``add_argument``, then call :meth:`load`; without a config (``needs_config`` false)
    call ``parse_args``.
    """

    def __init__(self, verb: str, description: str, needs_config: bool = True) -> None:
        whose = "--config F [options] [--table.key value ...]" if needs_config else "[options]"
        super().__init__(
            prog=f"python -m moe_dtensor {verb}",
            usage=f"python -m moe_dtensor {verb} {whose}",
            description=description,
            epilog=help_text() if needs_config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if needs_config:
            self.add_argument("--config", metavar="F", required=True, help="the TOML of the run")

    def load(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
        """Parse ``argv``: the verb's own options, and the Config with every override applied.

        Raises:
            ConfigError: an unknown option, a missing value, or whatever the config itself gets wrong.
        """
        own, overrides = split_overrides(argv)
        options = self.parse_args(own)
        return options, load(options.config, overrides)

    def error(self, message: str) -> NoReturn:
        """Called by argparse: a wrong command line is reported like a wrong config."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        word = unknown.split()[0].partition("=")[0].lstrip("-") if unknown else ""
        owners = [key for key in all_fields() if word and key.endswith(f".{word}")]
        near = owners or difflib.get_close_matches(word, all_fields(), n=1)
        hint = f"Did you mean {' or '.join(f'--{key}' for key in near)}?" if near else ""
        raise ConfigError(f"{self.prog.split()[-1]}: {message}.", hint or f"{self.prog} --help lists what there is.")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part ``--table.key value`` and ``--table.key=value`` (a dot in the name tells them) from all else.

    A key given twice counts as given last.
    """
    own: list[str] = []
    overrides: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and ("." in name or is_array(name[2:]))):
            own.append(word)
            continue
        if not equals:
            value = next(words, "--")
            # "--" cannot start a value: the next option was taken for one. "-1" can.
            if value.startswith("--"):
                raise ConfigError(f"{name} has no value.", f"Write {name} VALUE.")
        overrides[name[2:]] = value
    return own, overrides


def read_world_size(default: int) -> int:
    """Ranks, as the launcher's variables tell them; ``default`` where WORLD_SIZE is not set.

    Raises:
        ConfigError: one of the variables is no number, or RANK is none of WORLD_SIZE ranks.
    """
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdigit()):
            raise ConfigError(f"{name} = {text!r} is no number.", "Unset it, or start with ./run_train.sh.")
        numbers[name] = None if text is None else int(text)
    world_size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    if world_size is not None and not (rank or 0) < world_size:
        raise ConfigError(
            f"RANK = {rank} is none of WORLD_SIZE = {world_size} ranks, which count from 0.",
            "Unset both, or start with ./run_train.sh.",
        )
    return default if world_size is None else world_size


def check_meeting(world_size: int) -> None:
    """Raise ConfigError where several ranks are told of no place to meet at."""
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"WORLD_SIZE = {world_size}, but MASTER_ADDR and MASTER_PORT are not set: the ranks cannot meet.",
            "Start with ./run_train.sh or torchrun, or unset WORLD_SIZE for one rank.",
        )
