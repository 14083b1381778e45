"""Experts in float8: the kernels against the reference with the same rounding, and that rounding against none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from moe_dtensor.kernels.experts import float8_activation_triton
from tests.kernels.conftest import INTERPRETED
from tests.kernels.layer_cases import FLOAT8_CASES, Case, make_inputs, relative_errors, run

TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.float8e4nv: torch.float8_e4m3fn}
BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off what E4M3 has no room for, where GPUs round to the nearest."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if tl.float8e4nv not in (source, target) or not {source, target} <= TYPES.keys():
            return cut(values, source, target, mode)
        x = torch.frombuffer(bytearray(values.tobytes()), dtype=TYPES[source]) if values.size else torch.empty(0)
        found = (x.clamp(-448, 448) if target == tl.float8e4nv else x).to(TYPES[target]).view(torch.uint8).numpy()
        return np.frombuffer(found.tobytes(), BITS[target.primitive_bitwidth]).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "two passes"])
@pytest.mark.parametrize("case", FLOAT8_CASES, ids=str)
def test_equals_reference(case, whole, device, poisoned_memory, rounding, monkeypatch):
    if not whole:
        monkeypatch.setattr(float8_activation_triton, "WHOLE", 8)
    errors = relative_errors(case, "triton", torch.float32, device)
    # A number at the middle between two of E4M3's may go either way.
    assert max(errors.values()) < 5e-3, errors


def test_rows_wider_than_a_pass(device, poisoned_memory, rounding):
    errors = relative_errors(Case(12, 32, 2064, 3, 2, "swiglu", float8=True), "triton", torch.float32, device)
    assert max(errors.values()) < 5e-3, errors


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_three_digits_are_lost_and_no_more(backend, device, rounding):
    case = FLOAT8_CASES[0]
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32, device)
    results = []
    for one in (case, dataclasses.replace(case, float8=False)):
        y_TD = run(one, backend, leaves, expert_TK)
        results.append([y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)])
    for name, rounded, exact in zip(("y", "x", "w_up", "w_down", "gate"), *results, strict=True):
        error = ((rounded - exact).norm() / exact.norm()).item()
        assert 1e-2 < error < 1e-1, (name, error)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_is_seen(backend, value, device, rounding):
    case = FLOAT8_CASES[0]
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32, device)
    leaves[0].data[3, 5] = value
    y_TD = run(case, backend, leaves, expert_TK)
    assert not y_TD[3].isfinite().all()
    assert y_TD[4].isfinite().all()
    dy_TD[7, 2] = value
    dx_TD = torch.autograd.grad(y_TD, leaves[0], dy_TD)[0]
    assert not dx_TD[7].isfinite().all()
