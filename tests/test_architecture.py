"""The walk in ARCHITECTURE.md names files and functions that exist; no file and no function grows too long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG = {"expert_mlp"}  # arguments and what each of them is; the body is short


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


def test_files_and_functions_stay_short() -> None:
    for file in (ROOT / "moe_dtensor").rglob("*.py"):
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in LONG:
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, (file, node.name)


def _defined(file: Path) -> set[str]:
    """Functions and classes of a file, and ``Class.method``."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
        elif hasattr(node, "name"):
            names.add(node.name)
    return names
