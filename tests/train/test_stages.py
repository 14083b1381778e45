"""Stages: other lengths, weights and learning rates from a step on, the same after a resume and on every mesh."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks

TOML = """
[model]
num_layers = 2
dim = 24
num_heads = 2
[moe]
num_experts = 4
hidden_dim = 16
router = "topk"
[mesh]
dp = {dp}
pp = {pp}
tp = {tp}
[[data.sources]]
name = "web"
path = "{folder}/web.jsonl"
weight = 0.7
[[data.sources]]
name = "code"
corpus = "datasets"
path = "{folder}/code.jsonl"
weight = 0.3
[[stages]]
from_step = 4
weights = {{web = 0.2, code = 0.8}}
seq_len = 32
keep_batch_tokens = true
microbatch_size = 1
lr = 1e-2
[[stages]]
from_step = 6
lr = 1e-4
[training]
steps = 7
seq_len = 16
global_batch_size = 12
microbatch_size = 2
dtype = "{dtype}"
param_dtype = "{dtype}"
reduce_dtype = "{dtype}"
validation_interval = 3
[lr_scheduler]
warmup_steps = 0
decay = "constant"
[checkpoint]
interval = 1
keep_last = 0
"""
MESHES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 2))


def write(folder: Path, mesh: tuple[int, int, int] = (1, 1, 1), dtype: str = "float64") -> Path:
    """Two sources and a config of them."""
    for name in ("web", "code"):
        lines = [json.dumps({"text": f"{name} document {i} " * (1 + i % 5)}) for i in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    toml = folder / "config.toml"
    toml.write_text(TOML.format(folder=folder, dp=mesh[0], pp=mesh[1], tp=mesh[2], dtype=dtype))
    return toml


def _train(toml: str, run: str) -> None:
    from moe_dtensor.data import build_corpus
    from moe_dtensor.train.loop import Run
    from moe_dtensor.train.run_folder import open_run_folder

    config = resolve(load(toml, {"run.folder": run}), torch.distributed.get_world_size())
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    assert Run(config, torch.device("cpu"), corpus, open_run_folder(config, corpus.fingerprint())).to_the_end() == 0


def train(toml: Path, run: Path, ranks: int = 1) -> list[dict]:
    run_on_ranks(_train, ranks, str(toml), str(run))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def told(records: list[dict]) -> list[dict]:
    keys = ("step", "loss", "grad_norm", "lr", "source_loss", "source_tokens", "tokens", "validation_loss")
    return [{key: record[key] for key in keys if key in record} for record in records]


@pytest.mark.parametrize("killed", [(3,), pytest.param((2, 3, 4, 5), marks=pytest.mark.full)])
def test_a_switch_of_stages_resumes_before_at_and_after_it(tmp_path: Path, killed: tuple[int, ...]) -> None:
    toml = write(tmp_path)
    whole = told(train(toml, tmp_path / "whole"))
    assert [record["lr"] for record in whole] == [3e-4] * 3 + [1e-2] * 2 + [1e-4] * 2
    assert [record["tokens"] for record in whole] == [192 * step for step in range(1, 8)]
    read = [record["source_tokens"] for record in whole]
    assert all(sum(tokens.values()) == 192 * step for step, tokens in enumerate(read, 1))
    assert abs(read[2]["web"] - 0.7 * 576) < 16
    assert abs(read[6]["web"] - read[2]["web"] - 0.2 * 768) < 32
    for record in whole:
        shares = {name: tokens - (read[record["step"] - 2][name] if record["step"] > 1 else 0)
                  for name, tokens in record["source_tokens"].items()}  # fmt: skip
        mean = sum(record["source_loss"][name] * shares[name] for name in record["source_loss"]) / 192
        assert mean == pytest.approx(record["loss"], rel=1e-12)
    for kept in killed:  # steps taken then
        run = tmp_path / f"killed-{kept}"
        shutil.copytree(tmp_path / "whole", run)
        for step in range(kept + 1, 8):
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
        mark = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**mark, "finished_step": None}))
        assert told(train(toml, run)) == whole


@pytest.mark.parametrize("mesh", [MESHES[1], *(pytest.param(mesh, marks=pytest.mark.full) for mesh in MESHES[2:])])
def test_stages_and_sources_are_the_same_on_every_mesh(tmp_path: Path, mesh: tuple[int, int, int]) -> None:
    one = train(write(tmp_path), tmp_path / "one")
    many = train(write(tmp_path, mesh), tmp_path / "many", mesh[0] * mesh[1] * mesh[2])
    for a, b in zip(one, many, strict=True):
        assert a["source_tokens"] == b["source_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a["source_loss"] == pytest.approx(b["source_loss"], rel=1e-10)
