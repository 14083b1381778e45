"""The command line of ``verify``, its exit codes and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.load import load, override
from moe_dtensor.verbs.verify import DEFAULT_MESHES, choose_layouts
from moe_dtensor.verify.miniature import Layout, shrink

from . import mutations

DEBUG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
VERIFY = ["verify", "--config", DEBUG]


def test_passing_meshes_exit_0_and_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out.json"
    meshes = ["1x1x2", "1x2x1"]
    schedules = ["1F1B", "ZBVZeroBubble"]
    assert main([*VERIFY, "--meshes", *meshes, "--schedules", *schedules, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["mesh"], row["schedule"]) for row in rows] == [
        ("1x1x2", "none"),
        ("1x2x1", "1F1B"),
        ("1x2x1", "ZBVZeroBubble"),
    ]
    for row in rows:
        assert row["ok"] is True
        assert 0 < row["worst_error"] < 1e-9
        assert row["worst_name"].endswith(("weight", "w_up", "w_down"))
    printed = capsys.readouterr().out
    assert rows[0]["worst_name"] in printed
    assert "ZBVZeroBubble" in printed


def test_a_mismatch_exits_1_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with mutations.experts_times_tp():
        assert main([*VERIFY, "--meshes", "1x1x1", "1x1x2", "--json", str(out)]) == 1
    for row in json.loads(out.read_text()):
        assert row["ok"] is False
        assert "experts" in row["worst_name"]
        assert row["worst_ratio"] == pytest.approx(2.0)
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "2 times the oracle's norm" in printed


def test_a_rank_that_raises_is_a_mismatch_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise OSError("the roof is on fire")

    monkeypatch.setattr("moe_dtensor.verify.run.train_step", broken)
    out = tmp_path / "out.json"
    assert main([*VERIFY, "--meshes", "2x1x1", "--json", str(out)]) == 1
    (row,) = json.loads(out.read_text())
    assert "the roof is on fire" in row["failure"]
    assert "the roof is on fire" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--meshes", "2x2"], ["--meshes 2x2", "DPxPPxTP"]),
        (["--meshes", "1x1x3"], ["num_heads", "tp = 3"]),
        (["--meshes", "1x2x1", "--schedules", "1F2B"], ["1F2B", "1F1B"]),
        (["--meshes", "1x1x1", "--moe.router", "my.own:Router"], ["my.own:Router", "topk"]),
        (["--meshes", "1x2x1", "--model.tie_embeddings", "true"], ["tie_embeddings"]),
        (["--dtype", "float64", "--backend", "torch"], ["moe.backend = torch", "float64"]),
    ],
)
def test_what_cannot_be_verified_is_refused_by_name(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*VERIFY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error


def test_default_meshes_that_a_config_cannot_have_are_left_out_with_the_reason() -> None:
    layouts, refused = choose_layouts(load(DEBUG), None, None)
    assert [layout.mesh for layout in layouts] == list(DEFAULT_MESHES)
    assert refused == {}
    layouts, refused = choose_layouts(load(DEBUG, {"moe.num_experts": 4}), None, None)
    assert "1x1x8" not in [layout.mesh for layout in layouts]
    assert "moe.num_experts = 4" in refused["1x1x8"]


DEEPSEEK = {
    "moe.num_experts": "256",
    "moe.top_k": "8",
    "moe.router": "topk",
    "moe.score": "sigmoid",
    "moe.normalize_gates": "true",
    "moe.gate_scale": "2.5",
    "moe.expert_groups": "8",
    "moe.expert_groups_kept": "4",
    "moe.bias_rate": "0.001",
    "moe.balance_loss": "1e-4",
    "moe.balance_over": "sequence",
}


def test_a_miniature_keeps_expert_groups_with_experts_to_spare() -> None:
    values = {"moe.num_experts": 256, "moe.top_k": 8, "moe.router": "topk"}
    for groups, kept, experts in ((8, 4, 24), (8, 8, 16), (64, 3, 256), (4, 1, 36), (2, 1, 18)):
        config = load(DEBUG, values | {"moe.expert_groups": groups, "moe.expert_groups_kept": kept})
        if groups == 64:
            config = override(config, {"moe.top_k": 12})
        miniature = shrink(config, [Layout(1, 1, 1), Layout(1, 1, 2)])
        assert miniature.moe.num_experts == experts
        assert miniature.moe.expert_groups == groups


def test_routing_of_several_steps(tmp_path: Path) -> None:
    """A bias shows in the second step."""
    out = tmp_path / "out.json"
    options = [word for key, value in DEEPSEEK.items() for word in (f"--{key}", value)]
    assert main([*VERIFY, *options, "--meshes", "1x1x2", "2x1x1", "--json", str(out)]) == 0
    for row in json.loads(out.read_text()):
        assert row["errors"]["state"] == 0
        assert 0 < row["errors"]["statistic"] < 1e-9


@pytest.mark.parametrize(
    "router", [["expert_choice"], ["topk", "--moe.capacity_factor", "1.0", "--moe.jitter", "0.1"], ["zipf"]]
)
def test_float32_replays_what_is_chosen_and_what_is_kept(router: list[str]) -> None:
    arguments = ["--meshes", "1x1x2", "--dtype", "float32", "--activation_checkpoint.mode", "full"]
    assert main([*VERIFY, *arguments, "--moe.router", *router]) == 0


def test_float32_with_routing_replayed_where_outputs_are_kept() -> None:
    """Selective recomputation counts the operations of a forward pass: replaying took more of them the second time."""
    assert main([*VERIFY, "--meshes", "1x1x2", "--dtype", "float32", "--activation_checkpoint.mode", "selective"]) == 0


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.full), "full"])
def test_float32_with_routing_replayed(recompute: str) -> None:
    arguments = ["--meshes", "1x1x2", "1x2x1", "--schedules", "DualPipeV", "--dtype", "float32"]
    assert main([*VERIFY, *arguments, "--activation_checkpoint.mode", recompute]) == 0


def test_bfloat16_kernels_inside_the_mesh() -> None:
    assert main([*VERIFY, "--meshes", "1x1x2", "--dtype", "bfloat16", "--backend", "torch"]) == 0


def test_bfloat16_catches_a_scale_that_the_reference_backend_shares() -> None:
    with mutations.experts_times_tp():
        assert main([*VERIFY, "--meshes", "1x1x2", "--dtype", "bfloat16", "--backend", "torch"]) == 1
