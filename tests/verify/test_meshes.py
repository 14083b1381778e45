"""Every mesh computes the oracle's gradients: all pairs of settings, and the matrix this project started from."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from moe_dtensor.config.load import load
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.verdict import Verdict

from .mesh_cases import DIMENSIONS, MESHES, all_pairs, generated_cases, possible

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def explain(verdict: Verdict) -> str:
    return f"{verdict.mesh} {verdict.schedule}: {verdict.worst}, also {verdict.failed()[:10]} {verdict.failure}"


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=pytest.mark.full) if mesh in ("1x3x2", "1x1x8") else mesh for mesh in MESHES]
)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.full)], ids=["a_third", "all"])
def test_all_pairs(mesh: str, every: int) -> None:
    cases = [case for case in generated_cases() if case.layout.mesh == mesh][::every]
    assert len(cases) * every >= 3
    for verdict in prove(cases):
        assert verdict.ok, explain(verdict)


@pytest.mark.parametrize("tp", [1, 2, 4, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize("pp", [3, 2, 1])
def test_matrix_of_pipeline_and_tensor_parallelism(pp: int, tp: int) -> None:
    layout = Layout(1, pp, tp, "1F1B" if pp > 1 else "none")
    miniature = shrink(load(DEBUG), [layout, Layout(1, 3, 8, "1F1B")])
    (verdict,) = prove([Case(layout, miniature)])
    assert verdict.ok, explain(verdict)


def test_the_list_holds_every_possible_pair_and_is_short() -> None:
    settings = all_pairs(DIMENSIONS, possible)
    assert len(settings) <= 60
    assert all(possible(setting) for setting in settings)
    for a, b in itertools.combinations(DIMENSIONS, 2):
        for va, vb in itertools.product(DIMENSIONS[a], DIMENSIONS[b]):
            if possible({a: va, b: vb}):
                assert any(s[a] == va and s[b] == vb for s in settings), (a, va, b, vb)


def test_the_list_covers_what_it_claims() -> None:
    cases = generated_cases()
    placed = [case.layout.place(case.config) for case in cases]
    assert {case.layout.mesh for case in cases} == set(MESHES)
    assert {c.pipeline.schedule for c in placed if c.mesh.pp > 1} == set(DIMENSIONS["schedule"]) - {"none"}
    assert any(not c.mesh.sequence_parallel and c.training.seq_len % c.mesh.tp for c in placed)
    assert any(c.model.num_kv_heads < c.mesh.tp and c.model.num_kv_heads > 1 for c in placed)
    assert any(c.moe.group_sequences < c.training.microbatch_size for c in placed)
    assert any(case.empty_expert for case in cases)
