"""Where a step's time goes, from the spans of its kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dtensor.bench.measure import break_down, kind_of, union
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load, load_variants
from moe_dtensor.verbs import bench


def test_overlaps_count_once() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]


def test_what_hides_behind_computing_is_not_exposed() -> None:
    kernels = [
        ("gemm", (0.0, 4000.0)),
        ("ncclDevKernel_AllGather_RING_LL", (3000.0, 6000.0)),
        ("ncclDevKernel_SendRecv", (5000.0, 7000.0)),
        ("gemm", (8000.0, 10000.0)),
    ]
    found = break_down(kernels, steps=2)
    assert (found.step, found.computing, found.exposed, found.idle) == (5.0, 3.0, 1.5, 0.5)
    assert found.collectives == {"all_gather": 1.5, "send_receive": 1.0}
    assert found.exposed_collectives == {"all_gather": 1.0, "send_receive": 1.0}
    assert found.kernels == {"gemm": 3.0, "ncclDevKernel_AllGather_RING_LL": 1.5, "ncclDevKernel_SendRecv": 1.0}


def test_kinds() -> None:
    assert kind_of("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)") == "reduce_scatter"
    assert kind_of("ncclDevKernel_AllReduce_Max_f32_RING_LL") == "all_reduce"
    assert kind_of("void at::native::reduce_kernel<512, 1>") is None


def test_variants_are_measured_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = tmp_path / "variants.toml"
    variants.write_text('[plain]\n[even]\nmoe.router = "topk"\nmoe.balance_loss = 0.01\n')
    out = tmp_path / "out.json"
    words = ["train", "--config", "tests/config/plain.toml", "--variants", str(variants), "--json", str(out)]
    small = ["--model.num_layers", "1", "--data.corpus", "random", "--training.seq_len", "16", "--mesh.dp", "1"]
    assert bench.main([*words, *small, "--warmup", "1", "--measure", "1"]) == 0
    printed = capsys.readouterr().out
    assert "plain: " in printed
    assert "even: " in printed
    names = [record["name"] for record in json.loads(out.read_text())["variants"]]
    assert names == ["plain", "even"]


def test_a_wrong_variants_file(tmp_path: Path) -> None:
    config = load("tests/config/plain.toml")
    wrong = tmp_path / "wrong.toml"
    cases = {"": "has no variants", "mesh = 2": "mesh is no table", "[a]\nmesh.tq = 1": "no such key"}
    for text, problem in cases.items():
        wrong.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            load_variants(wrong, config)
