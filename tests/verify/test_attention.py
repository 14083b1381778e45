"""Every key of attention, on meshes, in pairs with each other and with placement, schedule and recomputation."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from moe_dtensor.verify.run import prove
from moe_dtensor.verify.verdict import Verdict

from .attention_cases import MESH_SETS, attention_cases, dimensions, possible, settings

MESHES = [mesh for meshes in MESH_SETS for mesh in meshes]


def explain(verdict: Verdict) -> str:
    return f"{verdict.mesh} {verdict.schedule}: {verdict.worst}, also {verdict.failed()[:10]} {verdict.failure}"


@pytest.mark.parametrize(
    "mesh", [mesh if mesh == "1x1x2" else pytest.param(mesh, marks=pytest.mark.full) for mesh in MESHES]
)
def test_all_pairs_of_attention_keys(mesh: str) -> None:
    cases = [case for case in attention_cases() if case.layout.mesh == mesh]
    assert len(cases) >= 5
    for case, verdict in zip(cases, prove(cases), strict=True):
        assert verdict.ok, f"{explain(verdict)}\n{case.config}"


def test_every_pair_meets_on_two_meshes() -> None:
    met = defaultdict(set)
    for meshes in MESH_SETS:
        for setting in settings(meshes):
            assert possible(meshes, setting)
            for pair in itertools.combinations(setting.items(), 2):
                met[pair].add(setting["mesh"])
    assert len(set().union(*MESH_SETS)) == sum(map(len, MESH_SETS)), "the sets are disjoint"
    for meshes in MESH_SETS:
        # Pipelines are in one of the sets only.
        values = {name: o for name, o in dimensions(meshes).items() if name not in ("mesh", "schedule")}
        for a, b in itertools.combinations(values, 2):
            for pair in itertools.product([(a, v) for v in values[a]], [(b, v) for v in values[b]]):
                if possible(meshes, dict(pair)):
                    assert len(met[pair]) >= 2, pair
