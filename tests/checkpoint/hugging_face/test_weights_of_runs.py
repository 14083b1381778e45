"""A run starts from published weights on any mesh, and leaves them as every mesh would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.convert import config_only
from moe_dtensor.config.load import load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.checkpoints import load_initial
from tests.checkpoint.hugging_face import tiny_models

MESHES = {
    "1x1x1": (1, 1, 1, "tp"),
    "1x1x2": (1, 1, 2, "tp"),
    "2x1x2": (2, 1, 2, "dp"),
    "1x2x2": (1, 2, 2, "tp_hidden"),
    "8x1x1": (8, 1, 1, "tp"),
    "2x1x2, over both": (2, 1, 2, "dp_tp"),
}


def placed(config: Config, mesh: str) -> Config:
    dp, pp, tp, experts = MESHES[mesh]
    keys = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "mesh.experts": experts, "training.seq_len": 16}
    keys["training.global_batch_size"] = 48  # for eight dp ranks too
    config = override(config, keys | ({"model.tie_embeddings": False} if pp > 1 else {}))
    return resolve(config, dp * pp * tp)


def initial_parameters(config: Config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    trainer = build(config, torch.device("cpu"))
    for part in trainer.parts:
        for param in part.parameters():
            param.detach().fill_(float("nan"))
    load_initial(trainer, config)
    found = {name: param.full_tensor() for part in trainer.parts for name, param in part.named_parameters()}
    return found, trainer.balance.bias_LE


@pytest.mark.parametrize(
    ("case", "meshes"),
    [
        ("ernie4_5_moe", ["1x1x1", "1x1x2", "2x1x2", "1x2x2"]),
        ("sarvam_moe", ["1x1x2"]),
        pytest.param("sarvam_moe", ["8x1x1", "2x1x2, over both"], marks=pytest.mark.full),
    ],
)
def test_every_mesh_starts_from_the_same_weights(case: str, meshes: list[str], tmp_path: Path) -> None:
    folder = tiny_models.save_model(case, tmp_path / "hf")
    assert main(["convert", "--from", "hf", "--to", "native", "--input", str(folder), "--output", f"{tmp_path}/n"]) == 0
    config_only(folder, tmp_path / "own.toml")
    config = load(tmp_path / "own.toml")
    expected, bias_LE = run_on_ranks(initial_parameters, 1, placed(config, "1x1x1"))[0]
    assert bias_LE.abs().min() > 0
    for initial in (str(folder), str(tmp_path / "n")):
        for mesh in meshes:
            placed_config = placed(override(config, {"checkpoint.initial": initial}), mesh)
            dp, pp, tp, _ = MESHES[mesh]
            names = set()
            for found, bias in run_on_ranks(initial_parameters, dp * pp * tp, placed_config):
                assert torch.equal(bias, bias_LE)
                for name, value in found.items():
                    twin = name if name in expected else "tok_embeddings.weight"
                    assert torch.equal(value, expected[twin]), (mesh, name)
                names |= set(found)
            assert names >= set(expected)


def test_a_run_of_another_model_is_refused_by_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save_model("mixtral", tmp_path / "hf")
    config_only(folder, tmp_path / "own.toml")
    run = ["train", "--config", f"{tmp_path}/own.toml", "--run.folder", f"{tmp_path}/run", "--data.corpus", "random"]
    change = ["--model.rope_theta", "500", "--moe.top_k", "3", "--model.vocab_size", "300"]
    assert run_on_ranks(_main_status, 1, run + change)[0] == (2, ["model.rope_theta", "moe.top_k"])
    assert not (tmp_path / "run").exists()


def _main_status(argv: list[str]) -> tuple[int, list[str]]:
    import contextlib
    import io

    torch.distributed.destroy_process_group()
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = main(argv)
    return status, [key for key in ("model.rope_theta", "moe.top_k") if key in error.getvalue()]
