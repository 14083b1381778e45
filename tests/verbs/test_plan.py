"""`plan`: arithmetic that must agree with the table, the counts, and what was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.build import build, override
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.model.activations import block_bytes, expert_rows
from moe_dtensor.model.counts import flops_per_token, parameters
from moe_dtensor.parallel.memory import fullest_rank, rank_memory
from moe_dtensor.parallel.schedule_costs import SOURCES, bubble, in_flight
from moe_dtensor.parallel.shares import all_shares, fold
from moe_dtensor.parallel.traffic import traffic
from moe_dtensor.verbs import plan

RESULTS = Path("docs/results")
MEASURED = [
    ("olmoe_small", None, None),
    ("neox_125m_dmoe", None, None),
    ("debug", None, None),
    ("olmoe_small", 8, 38.7),
    ("neox_125m_dmoe", 8, 14.2),
    ("neox_125m_dmoe", 16, 18.6),
]
"""(result of ``bench train``, sequences in a forward and GiB from docs/log.md where it has no file of its own)."""


def preset(name: str, mesh: str, **keys: Any) -> Config:
    """A resolved preset on a mesh."""
    dp, pp, tp = map(int, mesh.split("x"))
    overrides = {key.replace("__", "."): value for key, value in keys.items()}
    config = plan.with_vocabulary(override(load(f"train_configs/{name}.toml"), overrides))
    return resolve(replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp)), dp * pp * tp)


@pytest.mark.parametrize(("name", "size", "gib"), MEASURED)
def test_memory_is_what_was_measured(name: str, size: int | None, gib: float | None) -> None:
    record = json.loads((RESULTS / f"h100_train_{name}.json").read_text())
    tables = record["config"]
    if size:
        tables["training"]["microbatch_size"] = tables["moe"]["group_sequences"] = size
    memory = rank_memory(resolve(build(tables), record["ranks"]), 0)
    assert memory.peak / 2**30 == pytest.approx(gib or record["result"]["peak_memory_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("olmoe_small", {}),
        ("qwen3_30b_a3b", {}),
        ("neox_125m_dmoe", {}),
        ("debug", {"moe__every": 2, "moe__num_shared_experts": 1, "model__tie_embeddings": True}),
        ("debug", {"moe__num_experts": 0, "model__activation": "gelu", "model__qk_norm": "head"}),
    ],
)
def test_parameters_add_up_to_the_count(name: str, keys: dict[str, Any]) -> None:
    config = preset(name, "1x1x1", **keys)
    assert sum(folded.count * folded.share.size for folded in fold(all_shares(config))) == parameters(config)[0]
    assert all(share.local == share.shape for share in all_shares(config))


@pytest.mark.parametrize("mesh", ["8x2x8", "4x2x4", "2x1x2"])
def test_local_shapes_times_ranks_are_the_whole(mesh: str) -> None:
    config = preset("qwen3_30b_a3b", mesh)
    for share in all_shares(config):
        ranks = config.mesh.dp * (1 if share.row.tp is None else config.mesh.tp)
        assert math.prod(share.local) * ranks == share.size, share.name


def test_stages_have_each_parameter_once() -> None:
    names = [share.name for share in all_shares(preset("debug", "1x3x2", pipeline__schedule="ZBVZeroBubble"))]
    assert len(names) == len(set(names))
    assert {"tok_embeddings.weight", "layers.5.moe.router.weight", "output.weight"} <= set(names)


def test_skew_takes_more_rows_only_where_experts_are_split() -> None:
    split, whole = preset("qwen3_30b_a3b", "8x2x8"), preset("olmoe_small", "1x1x1")
    assert expert_rows(split, skewed=False) == 4096 * 8 // 8
    assert expert_rows(split, skewed=True) == 4096 * 8
    assert expert_rows(whole, skewed=False) == expert_rows(whole, skewed=True) == 16 * 2048 * 8
    assert fullest_rank(split, skewed=True)[1].peak > fullest_rank(split)[1].peak
    assert fullest_rank(whole, skewed=True) == fullest_rank(whole)


def test_recomputation_keeps_less_and_needs_more_in_the_backward() -> None:
    modes = ("none", "selective", "full")
    none, selective, full = (
        block_bytes(preset("olmoe_small", "1x1x1", activation_checkpoint__mode=m), is_moe=True) for m in modes
    )
    assert none.kept > selective.kept > full.kept == 16 * 2048 * 1024 * 2
    assert none.backward < selective.backward < full.backward


def test_experts_keep_their_input_and_hidden_rows() -> None:
    """The formula of docs/log.md: 2 TD for x and 4 TKF for H in bf16."""
    config = preset("olmoe_small", "1x1x1")
    wider = preset("olmoe_small", "1x1x1", moe__hidden_dim=1024)
    tokens = 16 * 2048
    assert block_bytes(wider, True).kept - block_bytes(config, True).kept == 4 * tokens * 8 * 512


def test_gradients_are_whole_while_microbatches_accumulate() -> None:
    four, one = (rank_memory(preset("olmoe_small", "4x1x1", training__global_batch_size=b), 0) for b in (256, 64))
    assert four.gradients == 4 * parameters(preset("olmoe_small", "4x1x1"))[0]
    assert one.gradients == one.weights == four.gradients // 4


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("GPipe", 3 / 19),
        ("1F1B", 3 / 19),
        ("Interleaved1F1B", 3 / 35),
        ("InterleavedZeroBubble", 3 / 99),
        ("ZBVZeroBubble", 0),
        ("DualPipeV", 3 / 51),
    ],
)
def test_bubbles(schedule: str, share: float) -> None:
    """p = 4, m = 16, v = 2."""
    config = preset("qwen3_30b_a3b", "8x4x1", pipeline__schedule=schedule)
    assert bubble(config) == pytest.approx(share)
    assert schedule in SOURCES
    for pp_rank in range(4):
        assert all(1 <= count <= 16 for count in in_flight(config, pp_rank).values())


def test_1f1b_keeps_one_microbatch_for_each_stage_ahead() -> None:
    config = preset("qwen3_30b_a3b", "8x4x1", pipeline__schedule="1F1B")
    assert [in_flight(config, rank) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]


def test_bytes_sent() -> None:
    assert vars(traffic(preset("olmoe_small", "1x1x1"))) == {"dp": 0, "pp": 0, "tp": 0}
    config = preset("olmoe_small", "4x1x1")  # one microbatch: two gathers in bf16, one reduction in float32
    assert traffic(config).dp == parameters(config)[0] * (2 * 2 + 4) * 3 // 4
    config = preset("debug", "1x2x1", pipeline__schedule="1F1B")  # 8 microbatches of 3 x 128 tokens in float32
    assert traffic(config).pp == 8 * 3 * 128 * 128 * 4
    config = preset("debug", "1x2x1", pipeline__schedule="ZBVZeroBubble")  # the turn of the V stays on its rank
    assert traffic(config).pp == 2 * 8 * 3 * 128 * 128 * 4
    split, more = (traffic(preset("debug", f"1x1x{tp}")).tp for tp in (2, 8))
    assert split / (1 / 2) == pytest.approx(more / (7 / 8), rel=1e-3)


def test_a_mesh_that_cannot_run_is_refused_beside_one_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "plan.json"
    words = ["--config", "train_configs/debug.toml", "--meshes", "2x2x2", "1x1x3", "--json", str(out)]
    assert plan.main(words) == 2
    text = capsys.readouterr().out
    assert "1x1x3 cannot run: model.num_heads = 8 is not a multiple of mesh.tp = 3" in text
    assert "layers.*.moe.experts.w_up" in text
    assert "bubble" in text
    done, refused = json.loads(out.read_text())
    assert refused["mesh"] == "1x1x3"
    assert "Set mesh.tp to a divisor of 8" in refused["refused"]
    config = preset("debug", "2x2x2")
    assert done["flops_per_step"] == flops_per_token(config) * 24 * 128
    assert sum(row["count"] * math.prod(row["shape"]) for row in done["parameters"]) == done["total_parameters"]
    rank, memory = fullest_rank(config)
    assert done["memory_bytes"]["balanced"]["peak"] == memory.peak
    assert done["memory_bytes"]["balanced"]["pipeline_rank"] == rank


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--meshes", "2x2"], "--meshes 2x2: not a mesh"),
        (["--data.tokenizer", "tokenizer.json"], "which plan does not load"),
    ],
)
def test_what_plan_cannot_know(words: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        plan.main(["--config", "train_configs/debug.toml", *words])


def test_world_comes_from_ngpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NGPU", "8")
    assert plan.main(["--config", "train_configs/debug.toml", "--mesh.tp", "2"]) == 0
    assert "dp=4 x pp=1 x tp=2" in capsys.readouterr().out


def test_it_loads_no_torch() -> None:
    script = (
        "import sys; from moe_dtensor.__main__ import main\n"
        "code = main(['plan', '--config', 'train_configs/qwen3_30b_a3b.toml', '--meshes', '8x2x8'])\n"
        "sys.exit(code or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
