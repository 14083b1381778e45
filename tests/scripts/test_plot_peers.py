"""The README's picture holds the numbers of the JSON files it is drawn from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


def plot(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/plot_peers.py", *arguments], capture_output=True, text=True, check=False
    )


def record(peers: list[dict[str, Any]]) -> dict[str, Any]:
    ours = {"tokens_per_second": 161_000.0, "peak_memory_gib": 50.25}
    return {"result": ours, "peers": peers, "config": {"run": {"folder": "outputs/olmoe_small"}}}


def test_numbers_and_names(tmp_path: Path) -> None:
    train, out = tmp_path / "train.json", tmp_path / "a" / "out.svg"
    peers = [
        {"result": {"tokens_per_second": 61_000.0, "peak_memory_gib": 71.5}},
        {"result": {"tokens_per_second": 77_000.0, "peak_memory_gib": 66.0}},
        {"result": None},
    ]
    train.write_text(json.dumps(record(peers)))
    done = plot(out, "--train", train, "--layer", ROOT / "docs/results/h100_layer_uniform.json")
    assert done.returncode == 0, done.stderr
    svg = out.read_text()
    for text in ("olmoe small", " 161", " 77", " 50", " 66", "qwen3 30b", " 196", "torchtitan"):
        assert f"{text}<" in svg, text
    assert " 61<" not in svg
    assert "neox125m" not in svg  # not gated: torchtitan computes another layer


def test_a_result_without_peers_is_told(tmp_path: Path) -> None:
    train = tmp_path / "train.json"
    train.write_text(json.dumps(record([])))
    done = plot(tmp_path / "out.svg", "--train", train)
    assert done.returncode == 1
    assert "Make it with bench train --peers" in done.stderr
