"""``convert`` with other experts: from a run to a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.checkpoint.native import NativeWeights, find_native
from moe_dtensor.config.load import dump, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.step import read_batch, train_step

SMALL = {
    "model.num_layers": 2,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 24,
    "moe.num_experts": 4,
    "moe.hidden_dim": 8,
    "moe.router": "topk",
    "moe.bias_rate": 0.01,
    "data.corpus": "random",
    "training.seq_len": 16,
    "training.global_batch_size": 4,
    "training.dtype": "float64",
    "training.param_dtype": "float64",
    "training.reduce_dtype": "float64",
    "lr_scheduler.warmup_steps": 1,
}
ROWS = ("router.weight", "experts.w_up", "experts.w_down")


def train(folder: Path, config: Config, steps: int) -> dict[str, Tensor]:
    """Go on in a run's folder for some steps, and save; what the optimizer knew of block 1's experts before."""
    config = resolve(config, 1)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, corpus)
    manager = CheckpointManager(
        folder / "checkpoints",
        config,
        list(trainer.parts),
        trainer.optimizers,
        trainer.schedule,
        loader,
        trainer.balance,
    )
    start = manager.load_latest() or 0
    state = trainer.optimizers.state_dict()
    keys = [f"state.layers.1.moe.{name}.exp_avg" for name in ROWS] if config.moe.num_experts else []
    before = {key: state[key].full_tensor().clone().numpy() for key in keys if start}
    for _ in range(steps):
        assert train_step(trainer, read_batch(trainer, loader)).finite
    manager.save(start + steps)
    (folder / "config.toml").write_text(dump(config))
    (folder / "run.json").write_text(json.dumps({"run_id": "a", "data": corpus.fingerprint(), "finished_step": 3}))
    return before


def a_run(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    run_on_ranks(train, 1, folder, override(Config(), SMALL | changes), 3)
    return folder


def convert(source: Path, output: Path, *words: str) -> int:
    both = ["--from", "native", "--to", "native", "--input", str(source), "--output", str(output)]
    return main(["convert", *both, *words])


def test_a_run_with_fewer_experts_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = a_run(tmp_path / "run")
    named = tmp_path / "named.json"
    named.write_text(json.dumps({"0": [3, 1], "1": [0, 2]}))
    assert convert(source, tmp_path / "pruned", "--prune-experts", str(named)) == 0
    assert (
        "2 experts for 4, top 2; of a block's experts 2 keep their optimizer state, 0 start" in capsys.readouterr().out
    )
    old, new = (NativeWeights(find_native(folder).checkpoint) for folder in (source, tmp_path / "pruned"))
    for name in ROWS:
        assert torch.equal(new.read(f"layers.1.moe.{name}"), old.read(f"layers.1.moe.{name}")[[1, 3]])
    assert torch.equal(new.bias_LE(), torch.stack([old.bias_LE()[0, [0, 2]], old.bias_LE()[1, [1, 3]]]))
    config = find_native(tmp_path / "pruned").config
    (moments,) = run_on_ranks(train, 1, tmp_path / "pruned", config, 1)
    (unchanged,) = run_on_ranks(train, 1, source, find_native(source).config, 1)
    for key, value in moments.items():
        assert (value == unchanged[key][[1, 3]]).all(), key
    assert find_native(tmp_path / "pruned").checkpoint.name == "step-00000004"


def test_twice_the_experts_are_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = a_run(tmp_path / "run")
    assert convert(source, tmp_path / "added", "--add-experts", "4", "--add-noise", "0") == 0
    told = capsys.readouterr().out
    assert "8 experts for 4, top 4; of a block's experts 4 keep their optimizer state, 4 start" in told
    assert float(told.split("differs by ")[1].split()[0]) < 1e-14
    assert json.loads((tmp_path / "added" / "run.json").read_text())["finished_step"] is None
    assert convert(tmp_path / "added", tmp_path / "merged", "--merge-experts", "2") == 2
    assert "2 experts are fewer than moe.top_k = 4" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert convert(tmp_path / "added", tmp_path / "merged", "--merge-experts") == 0
    assert "4 experts for 8, top 4; " in capsys.readouterr().out


def test_a_dense_run_becomes_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = a_run(tmp_path / "run", **{"moe.num_experts": 0, "moe.bias_rate": 0.0})
    how = ["--upcycle", "6", "--upcycle-top-k", "4", "--upcycle-split", "2"]
    assert convert(source, tmp_path / "up", *how) == 0
    told = capsys.readouterr().out
    assert "6 experts, top 4, in 2 blocks; the dense model: " in told
    assert float(told.split("differs by ")[1].split()[0]) < 1e-14
    native = find_native(tmp_path / "up")
    assert native.config.moe.hidden_dim == 12
    up = NativeWeights(native.checkpoint).read("layers.0.moe.experts.w_up")
    gate = NativeWeights(find_native(source).checkpoint).read("layers.0.feed_forward.gate.weight")
    assert torch.equal(up[4, 0], gate[:12])
    assert torch.equal(up[5, 0], gate[12:])
    assert convert(source, tmp_path / "noisy", "--upcycle", "4", "--upcycle-reinit", "0.5") == 0
    assert "not the dense model exactly" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--prune-experts", "1", "--add-experts", "1"], "are two changes"),
        (["--upcycle", "4", "--dtype", "float32"], "keeps the dtype"),
        ([], "changes nothing"),
    ],
)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], rule: str) -> None:
    assert convert(tmp_path, tmp_path / "out", *words) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
