"""``verify --hf``: transformers' own modules against the oracle, and faults on either side found out by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope
from moe_dtensor.checkpoint.hugging_face.families import FAMILIES
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource
from moe_dtensor.checkpoint.hugging_face.table import Family
from moe_dtensor.verify.hugging_face import prove_folder
from tests.checkpoint.hugging_face import tiny_models


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_every_family_computes_the_same_there_and_here(case: str, tmp_path: Path) -> None:
    source = HuggingFaceSource(tiny_models.save_model(case, tmp_path / "hf"))
    for verdict in prove_folder(source):
        assert verdict.ok, (verdict.mesh, verdict.failed()[:5], verdict.worst)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(case: str) -> Path:
        path = root / case.replace(" ", "_")
        return path if path.exists() else tiny_models.save_model(case, path)

    return folder


def change(family: Family, native: str, **keys: object) -> Family:
    """The family with one entry of its table changed."""
    assert any(entry.native == native for entry in family.tensors)
    tensors = tuple(replace(e, **keys) if e.native == native else e for e in family.tensors)  # type: ignore[arg-type]
    return replace(family, tensors=tensors)


def lost(family: Family, native: str, extra: str) -> Family:
    tensors = tuple(entry for entry in family.tensors if entry.native != native)
    return replace(family, tensors=tensors, extras=(*family.extras, extra))


MUTATIONS: dict[str, tuple[str, Callable[[Family], Family], str]] = {
    "gate and up swapped": (
        "mixtral",
        lambda f: change(f, "layers.{i}.moe.experts.w_up", words={"g": ("w3", "w1")}),
        "layers.1 input differs by .*model.layers.0.block_sparse_moe.experts.[*].w3.weight",
    ),
    "a transposed projection": (
        "mixtral",
        lambda f: change(f, "layers.{i}.attention.wq.weight", layout="d q"),
        "layers.0 feed-forward input differs by .*model.layers.0.self_attn.q_proj.weight",
    ),
    "rows that are not permuted": (
        "ernie4_5_moe",
        lambda f: change(f, "layers.{i}.attention.wk.weight", axes="q d", layout=""),
        "layers.0 feed-forward input differs by .*model.layers.0.self_attn.k_proj.weight",
    ),
    "another theta": (
        "qwen3",
        lambda f: replace(f, keys=tuple(_Theta() if isinstance(k, Rope) else k for k in f.keys)),
        "layers.0 feed-forward input differs by .*rope_theta",
    ),
}


class _Theta(Rope):
    def read(self, raw: object, function: dict[str, object]) -> None:  # type: ignore[override]
        super().read(raw, function)  # type: ignore[arg-type]
        function["model.rope_theta"] = 500.0


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_table_is_caught_and_the_tensor_named(
    mutation: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, mutate, told = MUTATIONS[mutation]
    folder = folders(case)
    family = FAMILIES[tiny_models.CASES[case][0]]
    monkeypatch.setitem(FAMILIES, family.model_type, mutate(family))
    assert main(["verify", "--hf", str(folder), "--dtype", "float64"]) == 1
    assert re.search(told, capsys.readouterr().out)


@pytest.mark.parametrize("part", ["a dropped expert", "a lost bias"])
def test_a_tensor_that_the_table_leaves_out_is_named(
    part: str,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every file tensor is accounted for, so neither can be lost without a word."""
    folder = folders("dots1")
    family = FAMILIES["dots1"]
    native = "layers.{i}.moe.router.bias"
    if part == "a lost bias":
        tensors = tuple(entry for entry in family.tensors if entry.native != native)
        keys = tuple(k for k in family.keys if getattr(k, "native", "") != "moe.selection_bias")
        monkeypatch.setitem(FAMILIES, "dots1", replace(family, tensors=tensors, keys=keys))
        told = "e_score_correction_bias"
    else:
        config = folder / "config.json"
        text = config.read_text()
        folder = tmp_path / "fewer"
        shutil.copytree(config.parent, folder)
        (folder / "config.json").write_text(text.replace('"n_routed_experts": 8', '"n_routed_experts": 7'))
        told = "experts.7."
    assert main(["verify", "--hf", str(folder), "--dtype", "float64"]) == 2
    assert told in capsys.readouterr().err


def test_a_wrong_router_gradient_in_transformers_is_found_out(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right logits, right loss, and a router that learns from nothing but the sum of its gates."""
    from transformers.models.mixtral import modeling_mixtral

    class DetachedRouter(modeling_mixtral.MixtralTopKRouter):
        def forward(self, hidden_states: torch.Tensor):  # type: ignore[no-untyped-def]
            logits, gates, chosen = super().forward(hidden_states)
            return logits, gates.detach() + 0.5 * (gates - gates.detach()), chosen

    monkeypatch.setattr(modeling_mixtral, "MixtralTopKRouter", DetachedRouter)
    assert main(["verify", "--hf", str(folders("mixtral")), "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert "differs by" not in out
    assert "gradient of model.layers.2.block_sparse_moe.gate.weight: error 5.00e-01" in out
    assert "0.5 times the oracle's norm" in out


def test_a_right_folder_passes(folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--hf", str(folders("mixtral"))]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
