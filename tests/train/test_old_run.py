"""A run's folder as an older version wrote it goes on under this one.

``old_run/run.tar.xz`` holds a run of eight steps on two ranks (dp), killed after its fifth, with the checkpoint of step
4: config.toml, run.json, metrics.jsonl and checkpoint are as the program of 28 November 2026 wrote them.
"""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import build_corpus
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import loop
from moe_dtensor.train.run_folder import open_run_folder

HERE = Path(__file__).parent / "old_run"
# Of the same run left alone, by the same old program.
LOSSES = [5.7744, 5.7781, 5.7692, 5.7745, 5.7758, 5.7735, 5.7706, 5.7707]
# The old program took the padding of the vocabulary into the softmax, 320 rows for 257 bytes: at first all weigh alike.
PADDING = math.log(320 / 257)


def go_on(config: Config) -> tuple[int, str]:
    config = resolve(config, dist.get_world_size())
    corpus = build_corpus(config)
    folder = open_run_folder(config, corpus.fingerprint())
    run = loop.Run(config, torch.device("cpu"), corpus, folder)
    first = run.step
    assert run.to_the_end() == 0
    return first, folder.run_id


def test_an_older_run_goes_on(tmp_path: Path) -> None:
    with tarfile.open(HERE / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "old_run"
    config = load(folder / "config.toml", {"run.folder": str(folder), "data.path": str(HERE / "text.txt")})
    old_id = json.loads((folder / "run.json").read_text())["run_id"]
    assert run_on_ranks(go_on, 2, config) == [(4, old_id)] * 2
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    losses = [record["loss"] for record in records]
    # Step 5 was taken and not saved: it is taken again.
    assert losses[:4] == pytest.approx(LOSSES[:4], abs=2e-4)
    assert losses[4:] == pytest.approx([loss - PADDING for loss in LOSSES[4:]], abs=1e-3)


def test_an_older_run_goes_on_with_another_mesh(tmp_path: Path) -> None:
    with tarfile.open(HERE / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "old_run"
    config = load(folder / "config.toml", {"run.folder": str(folder), "data.path": str(HERE / "text.txt")})
    config = replace(config, mesh=replace(config.mesh, dp=1))
    assert run_on_ranks(go_on, 1, config)[0][0] == 4
