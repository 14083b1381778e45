"""The study runs from end to end, in a tiny setting."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY = [
    *("--model.dim", "16", "--model.num_layers", "2", "--model.num_heads", "4", "--moe.hidden_dim", "8"),
    *("--training.seq_len", "16", "--training.validation_interval", "2", "--training.validation_sequences", "24"),
]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend("scripts")
    spec = importlib.util.spec_from_file_location("study_routing", "scripts/study_routing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study_routing", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HELD_OUT_SEQUENCES", 24)
    monkeypatch.setattr(module, "PLACEMENTS", (("tp", "all_gather"), ("dp_tp", "all_to_all")))
    return module


def test_it_trains_measures_and_does_not_repeat_itself(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    own = ["--steps", "2", "--seeds", "1", "--settings", "dense,expert_choice", "--mesh", "2x1x2"]
    words = [*own, "--runs", str(tmp_path / "runs"), "--out", str(out), *TINY]
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert study.main(words) == (0 if drawn else 1)
    dense, chosen = json.loads((out / "routers.json").read_text())["runs"]
    assert dense["held_out"]["evaluation"] == dense["held_out"]["training"]
    assert chosen["curves"]["validation_loss"][0] == [2]
    assert chosen["held_out"]["training"]["load_max_over_mean"] == 1
    assert chosen["held_out"]["evaluation"]["load_max_over_mean"] > 1
    assert chosen["held_out"]["evaluation"]["loss"] != chosen["held_out"]["training"]["loss"]
    _, sent = json.loads((out / "bytes.json").read_text())["placements"]
    assert sent["measured"]["dp_tp/all_to_all"] > 0
    if drawn:
        assert (out / "held_out.svg").stat().st_size > 1000
    capsys.readouterr()
    study.main(words)
    assert capsys.readouterr().out.startswith("2 runs of 2 steps, 2 of them finished before\n")


def test_names_stand_apart(study: ModuleType) -> None:
    places = sys.modules["study_plots"].spread([0.1, 0.11, 0.12, 0.9], gap=0.1)
    assert places == pytest.approx([0.01, 0.11, 0.21, 0.9])


def test_the_page_has_the_table_of_its_data(study: ModuleType) -> None:
    table = sys.modules["study_plots"].table(json.loads(Path("docs/study/routers.json").read_text()))
    assert "\n".join(table) in Path("docs/study.md").read_text()


def test_a_shrunk_picture_keeps_its_styles_and_outlines(study: ModuleType) -> None:
    svg = '<style>*{}</style>\n <!-- a -->\n <path d="M 1.23 4.00 \nL 5.55 -6.07 \nz\n" style="fill: none"/>\n'
    shrunk = '<style>*{}.s0{fill: none}</style>\n<path d="M1.2 4L5.5 -6.1z" class="s0"/>\n'
    assert sys.modules["study_plots"].shrink(svg) == shrunk
