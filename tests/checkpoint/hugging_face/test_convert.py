"""Weights to our side and back: the same bits; what is wrong is told in a sentence and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dtensor.__main__ import main
from tests.checkpoint.hugging_face import tiny_models


def convert(way: str, source: Path, output: Path, *more: str) -> int:
    start, end = way.split(">")
    return main(["convert", "--from", start, "--to", end, "--input", str(source), "--output", str(output), *more])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full) if case in tiny_models.ONLY_FULL else case
        for case in tiny_models.CASES
    ],
)
def test_there_and_back_is_the_same_bits(case: str, tmp_path: Path) -> None:
    source = tiny_models.save_model(case, tmp_path / "hf")
    assert convert("hf>native", source, tmp_path / "native") == 0
    kind = tiny_models.CASES[case][0]
    more = ("--architecture", kind)
    assert convert("native>hf", tmp_path / "native", tmp_path / "back", *more) == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model("mixtral", tmp_path_factory.mktemp("models") / "mixtral", max_shard_size="100KB")


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def cut_a_shard(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def lose_a_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def add_a_ghost(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def change_a_shape(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            save_file(tensors | {"model.norm.weight": torch.ones(47)}, shard, {"format": "pt"})


def store_fp8(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, shard, {"format": "pt"})


FAULTS = {
    "cut short": (cut_a_shard, "is cut short"),
    "missing shard": (lose_a_shard, "which is not there"),
    "index entry without tensor": (add_a_ghost, "model.layers.0.ghost.weight"),
    "wrong shape": (change_a_shape, "model.norm.weight has shape [47]; config.json makes it [48]"),
    "fewer experts": (lambda f: change_config(f, num_local_experts=5), "experts.5.w1.weight"),
    "more experts": (
        lambda f: change_config(f, num_local_experts=7),
        "lacks model.layers.0.block_sparse_moe.experts.6.w1",
    ),
    "windows of some": (
        lambda f: change_config(
            f, sliding_window=64, layer_types=["full_attention", "sliding_attention", "full_attention"]
        ),
        "layer_types = ",
    ),
    "unknown key": (lambda f: change_config(f, soft_cap=30.0), "soft_cap = 30.0"),
    "scaled positions": (
        lambda f: change_config(f, rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        "longrope",
    ),
    "FP8": (store_fp8, "FP8 weights"),
    "quantised": (lambda f: change_config(f, quantization_config={"quant_method": "mxfp4"}), "mxfp4"),
    "other class": (lambda f: change_config(f, model_type="gemma9"), "model_type = 'gemma9' has no table"),
    "two thetas": (lambda f: change_config(f, rope_theta=77.0), "rope_theta = 77.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_nothing(
    fault: str, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, told = FAULTS[fault]
    source = copy(mixtral, tmp_path / "source")
    spoil(source)
    assert convert("hf>native", source, tmp_path / "native") == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_output_is_left_alone(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert convert("hf>native", mixtral, tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_no_class_holds_is_refused_by_its_keys(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("hf>native", mixtral, tmp_path / "native") == 0
    config = tmp_path / "native" / "config.toml"
    config.write_text(config.read_text().replace("[model]", '[model]\nactivation = "geglu"'))
    assert convert("native>hf", tmp_path / "native", tmp_path / "back") == 2
    assert 'model.activation = "geglu"' in capsys.readouterr().err


def test_the_config_alone_starts_from_the_folder(mixtral: Path, tmp_path: Path) -> None:
    assert convert("hf>native", mixtral, tmp_path / "own.toml", "--config-only") == 0
    text = (tmp_path / "own.toml").read_text()
    assert f'initial = "{mixtral}"' in text
    assert "num_experts = 6" in text
    assert main(["check", "--config", str(tmp_path / "own.toml")]) == 0
