"""What a rank does in Python does not grow with the world."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.bench import fake_world
from moe_dtensor.config.check import check
from moe_dtensor.config.load import load, override
from scripts.fake_world_table import CASES, tables

ROOT = Path(__file__).resolve().parents[2]
NARROW = "--model.dim 256 --model.num_heads 8 --moe.hidden_dim 32 --model.vocab_size 512"
SAME = ("collectives of a step", "process groups", "tensors")
"""What has to be the same however large the world is."""
PLANNING = ("build", "state", "local plan", "plan of all ranks", "the same at the next save")


@cache
def measure(mesh: str, flags: str = NARROW, config: str = "debug", rank: int = 0) -> dict[str, Any]:
    dp, pp, _ = map(int, mesh.split("x"))
    batch = ["--training.global_batch_size", str(dp * (4 * pp if pp > 1 else 1)), "--training.microbatch_size", "1"]
    command = [sys.executable, "-m", "moe_dtensor.bench.fake_world", "--config", f"train_configs/{config}.toml"]
    command += ["--mesh", mesh, "--rank", str(rank), *flags.split(), *batch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without_numbered_states(found: dict[str, Any]) -> dict[str, Any]:
    """Each rank saves the state of its own generator."""
    dp, pp, tp = map(int, found["mesh"].split("x"))
    return {**found, "tensors": found["tensors"] - dp * pp * tp}


def test_a_step_of_64_ranks_has_the_collectives_of_8() -> None:
    small, large = (without_numbered_states(measure(mesh)) for mesh in ("2x2x2", "16x2x2"))
    for what in SAME:
        assert large[what] == small[what], what
    assert small["collectives of a step"]["dp reduce_scatter"] > 0
    assert small["collectives of a step"]["pp send"] > 0
    assert large["parts"] > 4 * small["parts"]  # all ranks' parts are planned


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["128x2x2", "1024x2x2"])
def test_a_step_of_512_and_4096_ranks_has_the_collectives_of_8(mesh: str) -> None:
    flags = NARROW.replace("256", "1024")
    small, large = (without_numbered_states(measure(each, flags)) for each in ("2x2x2", mesh))
    for what in SAME:
        assert large[what] == small[what], what


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1, -1])
@pytest.mark.parametrize("case", [case for case in CASES if "512" in case.mesh or "32x16x8" in case.mesh], ids=str)
def test_4096_ranks_take_two_minutes_and_4_gb(case: Any, rank: int) -> None:
    found = measure(case.mesh, case.flags, case.config, rank)
    assert sum(found["seconds"][stage] for stage in PLANNING if stage in found["seconds"]) < 120
    assert found["resident MiB"] < 4000


def test_the_record_is_in_the_docs_and_within_its_bounds() -> None:
    record = json.loads((ROOT / "docs/results/fake_world.json").read_text(encoding="utf-8"))
    for table in tables(record):
        assert table in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for row in record["ranks"] + record["drawn"]:
        assert sum(row["seconds"][stage] for stage in PLANNING if stage in row["seconds"]) < 120, row
        assert row["resident MiB"] < 4000, row
    calls = {
        row["mesh"]: row["collectives of a step"]
        for row in record["ranks"]
        if (row["config"], row["rank"]) == ("qwen3_30b_a3b", 0) and "dp_replicate" not in row["flags"]
    }
    assert calls["8x1x8"] == calls["64x1x8"] == calls["512x1x8"]


def test_the_measured_meshes_can_run() -> None:
    for case in CASES:
        config = override(load(ROOT / f"train_configs/{case.config}.toml"), {"data.corpus": "random"})
        flags = dict(zip(case.flags.split()[::2], case.flags.split()[1::2], strict=True))
        dp, pp, tp = map(int, case.mesh.split("x"))
        changes = {key.removeprefix("--"): int(x) if x.isdigit() else x for key, x in flags.items()}
        changes |= {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "training.global_batch_size": dp * 4 * pp}
        check(override(config, changes), dp * pp * tp)


def test_kernels_of_gpus_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_world.dist, "get_world_size", lambda: 1)
    named = {"model.attention_backend": "fa4", "moe.backend": "quack", "training.param_dtype": "bfloat16"}
    found = fake_world.ready(override(load(ROOT / "train_configs/debug.toml"), named))
    assert (found.model.attention_backend, found.moe.backend) == ("auto", "auto")
