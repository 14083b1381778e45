"""``python -m moe_dtensor VERB ...``: find the verb, run it, report a wrong config in plain words."""

from __future__ import annotations

import ast
import contextlib
import difflib
import getpass
import importlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from moe_dtensor import verbs
from moe_dtensor.config.errors import WRONG, ConfigError, words


def main(argv: list[str] | None = None) -> int:
    """Run a verb; its exit code, or 2 for a wrong command line or config."""
    argv = sys.argv[1:] if argv is None else argv
    open_closed_streams()
    name_user()
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage())
            return 0
        return importlib.import_module(f"{verbs.__name__}.{find_verb(argv[0])}").main(argv[1:])
    except ConfigError as error:
        report(error)
        return WRONG


def open_closed_streams() -> None:
    """Let what is written to an output that was closed before the start vanish.

    Python has no stream for it then, and the next file that is opened would take its number.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def name_user() -> None:
    """Name a user whom the system has no account for, as containers may start one: libraries ask for a name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"


def find_verb(word: str) -> str:
    """The verb called ``word``, or a ConfigError that suggests one."""
    known = list(verb_helps())
    if word in known:
        return word
    near = difflib.get_close_matches(word, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(known)}."
    raise ConfigError(f"{word}: no such verb.", remedy)


def verb_helps() -> dict[str, str]:
    """Every verb with its line of help, read from its source so that none is imported (some load torch)."""
    helps = {}
    for path in sorted(Path(verbs.__path__[0]).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id="HELP")], value=ast.Constant(value=str(text))):
                    helps[path.stem] = text
    return helps


def usage() -> str:
    """The verbs, with a line on each."""
    lines = ["usage: python -m moe_dtensor VERB --config F [--table.key value ...]", ""]
    lines += [f"  {name:<10}{text}" for name, text in verb_helps().items()]
    return "\n".join([*lines, "", "python -m moe_dtensor VERB --help lists its options and every key of the config."])


def report(error: ConfigError) -> None:
    """Print the error to stderr; under torchrun only on rank 0: an error told here is every rank's."""
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    another_tells = rank.isdigit() and ranks.isdigit() and 0 < int(rank) < int(ranks)
    if not another_tells:
        with contextlib.suppress(OSError, ValueError):
            print(words(error.problem, error.remedy), file=sys.stderr, flush=True)
    else:
        # torchrun ends all ranks when the first one exits: leave rank 0 the time to speak.
        time.sleep(1)


def leave(status: int) -> NoReturn:
    """End the process with ``status``, whatever becomes of its output.

    Ranks end without the interpreter's shutdown: threads of gloo and of a save in the background can abort in it, and
    the status would be theirs.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # full, or its reader is gone: the interpreter would try again, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        except ValueError:
            pass
    if "torch.distributed" not in sys.modules:
        sys.exit(status)
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
