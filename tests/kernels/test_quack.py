"""The backend quack, by a stand-in for its package; on a GPU with the package ``test_cuda.py`` runs it."""

from __future__ import annotations

import sys

import pytest
import torch

from moe_dtensor.kernels.experts import grouped, quack
from moe_dtensor.kernels.experts.grouped import ByTorch

from . import quack_stand_in
from .layer_cases import ODD_CASES, Case, make_inputs, relative_errors, run


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for name, module in quack_stand_in.MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(grouped, "check", lambda *args: None)
    monkeypatch.setattr("moe_dtensor.kernels.experts.autograd.check", lambda *args: None)
    quack._config.cache_clear()
    yield
    quack._config.cache_clear()


CASES = [
    *ODD_CASES,
    Case(90, 64, 200, 5, 2, "swiglu", absent=4),
    Case(90, 64, 192, 3, 2, "relu2", rows="worst", held=2),
    Case(9, 16, 16, 5, 3, "swiglu", absent=1, rows=0),
    Case(9, 16, 16, 5, 3, "silu", absent=2, rows=40),  # more rows than copies
    Case(33, 16, quack.WIDE, 3, 2, "swiglu", absent=3),  # rows are written once
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, poisoned_memory):
    errors = relative_errors(case, "quack", torch.float64)
    assert all(error < 2e-7 for error in errors.values()), errors  # gates of rows and their gradients are float32


def test_fused_where_it_can_be(monkeypatch):
    """One node for the activations that products compute; else the nodes of the other backends."""
    calls = []
    monkeypatch.setattr(quack.ExpertMLP, "apply", lambda *args: calls.append(args[7]) or args[0])
    for activation in ("swiglu", "relu2", "silu", "gelu", "swiglu_clamped"):
        case = Case(9, 16, 16, 4, 2, activation)
        leaves, expert_TK, _ = make_inputs(case, torch.float64)
        run(case, "quack", leaves, expert_TK)
    case = Case(9, 16, 16, 4, 2, "swiglu", split=True)
    leaves, expert_TK, _ = make_inputs(case, torch.float64)
    run(case, "quack", leaves, expert_TK)
    assert calls == ["swiglu", "relu2", "silu"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_as_it_runs():
    case = Case(37, 16, 24, 5, 2, "swiglu", absent=3)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float64)
    expected = torch.autograd.grad(run(case, "quack", leaves, expert_TK), leaves, dy_TD)
    compiled = torch.compile(lambda *t: run(case, "quack", list(t), expert_TK), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves, dy_TD)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


def test_plain_products():
    torch.manual_seed(0)
    ends_E = torch.tensor([3, 3, 8, 8]).int()
    l_NP, r_NQ, w_EPQ = torch.randn(11, 16), torch.randn(11, 8), torch.randn(4, 16, 8)
    begins = quack.ByQuack.make_tiles(ends_E, 11)
    for a, transposed in ((l_NP, False), (r_NQ, True)):
        got, expected = (by.rows_times_weight(a, w_EPQ, ends_E, begins, transposed) for by in (quack.ByQuack, ByTorch))
        torch.testing.assert_close(got[:8], expected[:8])
    got, expected = (by.weight_gradient(l_NP, r_NQ, ends_E, begins) for by in (quack.ByQuack, ByTorch))
    torch.testing.assert_close(got, expected)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", None)
    case = Case(9, 16, 16, 4, 2, "swiglu")
    leaves, expert_TK, _ = make_inputs(case, torch.float32)
    with pytest.raises(ValueError, match=r"moe.backend = quack needs the package quack-kernels.*Run `pip install"):
        run(case, "quack", leaves, expert_TK)
