"""``python -m moe_dtensor VERB ...``: find the verb, run it, report a wrong config in plain words."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import pkgutil
import sys
import time
from pathlib import Path

from moe_dtensor import verbs
from moe_dtensor.config.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run a verb; its exit code, or 2 for a wrong command line or config."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage())
            return 0
        return importlib.import_module(f"{verbs.__name__}.{find_verb(argv[0])}").main(argv[1:])
    except ConfigError as error:
        report(error)
        return 2


def find_verb(word: str) -> str:
    """The verb called ``word``, or a ConfigError that suggests one."""
    known = verb_names()
    if word in known:
        return word
    near = difflib.get_close_matches(word, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(known)}."
    raise ConfigError(f"{word}: no such verb.", remedy)


def verb_names() -> list[str]:
    """Every verb, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(verbs.__path__))


def usage() -> str:
    """The verbs with a line on each, read from their source so that none is imported (some load torch)."""
    lines = ["usage: python -m moe_dtensor VERB --config F [--table.key value ...]", ""]
    for name in verb_names():
        tree = ast.parse((Path(verbs.__path__[0]) / f"{name}.py").read_text(encoding="utf-8"))
        texts = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP"
        ]
        lines.append(f"  {name:<10}{texts[0]}")
    return "\n".join([*lines, "", "python -m moe_dtensor VERB --help lists its options and every key of the config."])


def report(error: ConfigError) -> None:
    """Print the error to stderr; under torchrun only on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print("error: " + str(error).replace("\n", "\n       "), file=sys.stderr)
    else:
        # torchrun ends all ranks when the first one exits: leave rank 0 the time to speak.
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
