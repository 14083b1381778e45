"""``bench layer`` on a CPU: an answer that is right, timed beside the dense products."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dtensor.bench.shapes import SHAPES
from moe_dtensor.verbs import bench


def test_a_layer_is_timed_beside_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench.main(["layer", "--shapes", "tiny", "--backends", "reference", "--json", str(out)]) == 0
    assert "of dense" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert max(result["error"].values()) == 0
    assert result["tflops"] > 0
    assert result["dense_tflops"] > 0


def test_flops_are_those_of_the_products() -> None:
    tiny = SHAPES["tiny"]  # 512 tokens, 64 wide, 96 hidden, 8 experts, 2 choices, SwiGLU
    one_way = 2 * 512 * 2 * (64 * 2 * 96 + 96 * 64)
    assert tiny.expert_flops == 3 * one_way
    assert tiny.flops == tiny.expert_flops + 3 * 2 * 512 * 64 * 8
