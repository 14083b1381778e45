"""The walk in ARCHITECTURE.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_stop_of_the_walk_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    [walk] = re.findall(r"^## Follow a token\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    stops = [re.findall(r"`([^`]+)`", line.split("|")[2]) for line in walk.splitlines() if "`" in line]
    assert len(stops) == 5
    for stop in stops:
        defined: set[str] = set()
        for name in stop:
            if name.endswith(".py"):
                defined = _defined(ROOT / "moe_dtensor" / name)
            else:
                assert name in defined, name


def _defined(file: Path) -> set[str]:
    """Functions and classes of a file, and ``Class.method``."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
        elif hasattr(node, "name"):
            names.add(node.name)
    return names
