"""Steps of other trainers: two public faults found by name, and the same trainers mended."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.load import load
from moe_dtensor.verify.miniature import Layout
from moe_dtensor.verify.step_file import judge_step, read_step_file

from . import mutations, mutations_update

SCRIPTS = Path(__file__).parents[2] / "scripts"


def exporter(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transformers_agrees_and_its_double_softmax_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The load-balancing loss took the softmax of a softmax until March 2026: the router's gradient was another."""
    pytest.importorskip("transformers")
    export = exporter("step_file_transformers").export
    export(tmp_path / "good.json")
    assert main(["verify", "--against", str(tmp_path / "good.json")]) == 0
    export(tmp_path / "bad.json", double_softmax=True)
    assert main(["verify", "--against", str(tmp_path / "bad.json"), "--json", str(tmp_path / "out.json")]) == 1
    assert "gradient of model.layers.1.mlp.gate.weight" in capsys.readouterr().out
    assert "moe.router.weight" in json.loads((tmp_path / "out.json").read_text())["worst_name"]


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), pytest.param(Layout(2, 2, 1, "1F1B"), marks=pytest.mark.full)])
def test_our_own_step_passes_and_a_planted_fault_is_named(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = exporter("step_file_own")
    own.export(tmp_path / "good.json", load(own.DEBUG), layout)
    assert main(["verify", "--against", str(tmp_path / "good.json")]) == 0
    with mutations_update.gradient_ascent():
        own.export(tmp_path / "up.json", load(own.DEBUG), layout)
    assert main(["verify", "--against", str(tmp_path / "up.json")]) == 1
    assert "update of layers.0." in capsys.readouterr().out
    if layout.tp > 1:
        with mutations.experts_times_tp():
            own.export(tmp_path / "twice.json", load(own.DEBUG), layout)
        assert main(["verify", "--against", str(tmp_path / "twice.json")]) == 1
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("gradient of layers.")
        assert "moe.experts.w_" in printed[0]
        assert "2 times the oracle's norm" in printed[0]


def test_what_is_no_step_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("{}")
    assert main(["verify", "--against", str(tmp_path / "empty.json")]) == 2
    assert "is no step file" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_torchtitans_gate_under_tp_is_named(tmp_path: Path) -> None:
    """torchtitan 0.2.2 takes the gate's share of a gradient for all of it where experts are split over tp."""
    export = exporter("step_file_torchtitan").export
    export(tmp_path / "mended.json", mended=True)
    assert judge_step(read_step_file(tmp_path / "mended.json")).ok
    export(tmp_path / "shipped.json")
    verdict = judge_step(read_step_file(tmp_path / "shipped.json"))
    assert not verdict.ok
    assert "moe.router.weight" in verdict.worst.name
