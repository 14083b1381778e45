"""The table of a step's kernels by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.kernels_by_kind import kind_of, table

RESULT = Path("docs/results/h200_train_olmoe_small_float8.json")


def test_kinds_are_told_by_names() -> None:
    assert kind_of("rows_kernel") == "experts: products of rows"
    assert kind_of("triton_per_fused_div_exp_mul_round_sum_top_k_gates_view_3") == "norms and what the compiler fused"
    assert kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == "attention"
    assert kind_of("_gates_backward_kernel") == "routing"
    assert kind_of("backward_kernel") == "experts: activation and its gradient"
    assert kind_of("something new") == "other"


@pytest.mark.parametrize("variant", ["bfloat16", "float8"])
def test_the_table_in_the_docs_is_that_of_the_record(variant: str) -> None:
    record = next(r for r in json.loads(RESULT.read_text())["variants"] if r["name"] == variant)
    kernels = record["breakdown"][0]["kernels"]
    made = table(kernels)
    assert made in Path("docs/speed.md").read_text()
    assert kind_of(max(kernels, key=lambda name: kernels[name])) != "other"
