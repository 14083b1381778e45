"""What is wrong with an update, an evaluation or a checkpoint is caught in every dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.load import load, override
from moe_dtensor.verify.miniature import Layout, shrink, whole_case
from moe_dtensor.verify.run import Answers, prove
from moe_dtensor.verify.verdict import Verdict

from . import mutations, mutations_update

CONFIGS = Path(__file__).parents[2] / "train_configs"
DTYPES = ("float64", "float32", "bfloat16")
ONE, DP2 = Layout(1, 1, 1), Layout(2, 1, 1)


@dataclass(frozen=True)
class Expected:
    """What is broken, and the kind of quantity that has to say so first."""

    mutation: mutations.Mutation
    kind: str
    layout: Layout = ONE
    changes: dict[str, Any] = field(default_factory=dict)
    step: int = 1


MUTATIONS = [
    Expected(mutations_update.optimizer_never_steps, "moment"),
    Expected(mutations_update.gradient_ascent, "moment"),
    Expected(mutations_update.learning_rate_times_ten, "update"),
    Expected(mutations_update.no_clipping, "moment"),
    Expected(mutations_update.no_weight_decay, "update"),
    Expected(mutations_update.other_betas, "moment"),
    Expected(mutations_update.stale_weights_after_an_evaluation, "validation", DP2, step=3),
    Expected(mutations_update.bias_moves_with_every_microbatch, "state", changes={"moe.bias_rate": 0.001}),
    Expected(mutations_update.last_microbatch_counted_twice, "routing"),
    Expected(mutations_update.checkpoint_of_another_steps_moment, "moment", step=4),
]
BY_DEFAULT = {("bfloat16", e.mutation) for e in MUTATIONS[:6]} | {("float64", e.mutation) for e in MUTATIONS[6:]}
answers: Answers = {}


def verdict_in(dtype: str, layout: Layout, changes: dict[str, Any]) -> Verdict:
    """Of the reference backend in bfloat16, which nothing but the widest limits judges."""
    config = override(load(CONFIGS / "olmoe_small.toml"), changes | {"moe.backend": "reference", "mesh.tp": 1})
    miniature = shrink(config, [ONE, DP2], dtype)
    (verdict,) = prove([whole_case(layout, miniature)], answers=answers)
    return verdict


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_unbroken_library_passes(dtype: str) -> None:
    verdict = verdict_in(dtype, ONE, {})
    assert verdict.ok, (verdict.worst, verdict.failure)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        pytest.param(
            dtype,
            expected,
            id=f"{dtype}-{expected.mutation.__name__}",
            marks=[] if (dtype, expected.mutation) in BY_DEFAULT else [pytest.mark.full],
        )
        for dtype in DTYPES
        for expected in MUTATIONS
    ],
)
def test_caught_in_every_dtype(dtype: str, expected: Expected) -> None:
    """Of a tree in which these passed in narrow dtypes, the last column of every verdict on a GPU said nothing."""
    with expected.mutation():
        verdict = verdict_in(dtype, expected.layout, expected.changes)
    assert not verdict.failure
    assert not verdict.ok
    assert (verdict.worst.kind, verdict.worst.step) == (expected.kind, expected.step), verdict.worst
