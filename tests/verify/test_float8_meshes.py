"""Experts in float8: the key reaches both sides, and every mesh computes what the oracle does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load, override
from moe_dtensor.verify import oracle_float8
from moe_dtensor.verify.fuzz import draws
from moe_dtensor.verify.miniature import Case, Layout, judged, shrink, whole_case
from moe_dtensor.verify.run import IRRELEVANT, LIMITS, computation, limits_of, prove
from moe_dtensor.verify.verdict import Verdict

CONFIG = override(
    load(Path(__file__).parents[2] / "train_configs" / "debug.toml"),
    {"moe.expert_dtype": "float8", "moe.router": "topk", "moe.num_shared_experts": 1},
)
GATES: dict[str, dict[str, Any]] = {
    "output": {"moe.gate_on": "output", "moe.top_k": 2},
    # A token's copies would be different vectors: of these there is one.
    "input": {"moe.gate_on": "input", "moe.top_k": 1},
}
MESHES = {
    "1x1x1": (Layout(1, 1, 1), {}),
    "1x1x2": (Layout(1, 1, 2), {"mesh.experts": "tp"}),
    "2x1x1 all_gather": (Layout(2, 1, 1), {"mesh.experts": "dp", "mesh.dispatch": "all_gather"}),
    "2x1x1 all_to_all": (Layout(2, 1, 1), {"mesh.experts": "dp", "mesh.dispatch": "all_to_all"}),
}


def explain(verdict: Verdict) -> str:
    return f"{verdict.mesh} {verdict.schedule}: {verdict.worst}, also {verdict.failed()[:10]} {verdict.failure}"


def case_of(mesh: str, gate: str, dtype: str = "float64") -> Case:
    layout, changes = MESHES[mesh]
    return whole_case(layout, shrink(override(CONFIG, GATES[gate] | changes), [layout], dtype))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_compute_what_the_oracle_does(mesh: str, dtype: str) -> None:
    for verdict in prove([case_of(mesh, gate, dtype) for gate in GATES]):
        assert verdict.ok, explain(verdict)


def unrounded(v: Tensor) -> Tensor:
    return v


def rows_of_weights_scaled_apart(v: Tensor) -> Tensor:
    largest = v.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return oracle_float8.e4m3(v * (448 / largest)) * (largest / 448)


@pytest.mark.parametrize("wrong", [unrounded, rows_of_weights_scaled_apart])
def test_another_rounding_is_seen(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the oracle's that is wrong, which is the same disagreement."""
    monkeypatch.setattr(oracle_float8, "rounded", wrong)
    (verdict,) = prove([case_of("1x1x1", "output")])
    assert not verdict.ok
    assert not verdict.failure


def test_the_key_is_judged_and_tells_computations_apart() -> None:
    layout = Layout(1, 1, 2)
    for dtype in ("float64", "bfloat16"):
        assert judged(CONFIG, dtype).moe.expert_dtype == "float8"
        assert shrink(CONFIG, [layout], dtype).moe.expert_dtype == "float8"
    case = case_of("1x1x2", "output")
    plain = Case(layout, override(case.config, {"moe.expert_dtype": "param"}), steps=4, skipped=(2,), restarted=3)
    assert computation(case) != computation(plain)
    assert "moe.expert_dtype" not in IRRELEVANT


def test_no_wider_limit_holds_in_float64_nor_without_float8() -> None:
    for dtype, limits in LIMITS.items():
        narrow = shrink(CONFIG, [Layout(1, 1, 1)], dtype)
        assert limits_of(override(narrow, {"moe.expert_dtype": "param"})) == limits
        assert limits_of(override(narrow, {"moe.num_experts": 0})) == limits
        assert (limits_of(narrow) == limits) == (dtype == "float64")
        assert limits_of(narrow).keys() == limits.keys()


def test_biases_of_such_experts_are_refused() -> None:
    """A step file's config is seen by nothing else."""
    with pytest.raises(ConfigError, match=r"knows no moe\.expert_bias where moe\.expert_dtype = float8"):
        judged(override(CONFIG, {"moe.expert_bias": True}))


def test_the_fuzz_draws_it_with_gates_and_placements() -> None:
    drawn = [d.case.config for d in itertools.islice(draws(3), 96)]
    narrow = [config for config in drawn if config.moe.expert_dtype == "float8" and config.moe.num_experts]
    assert {config.moe.gate_on for config in narrow} == {"output", "input"}
    assert {config.mesh.dispatch for config in narrow} >= {"all_gather", "all_to_all"}
    assert any(config.moe.top_k > 1 for config in narrow)
