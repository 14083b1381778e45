"""On a GPU only: sizes of real layers, no host sync, CUDA graphs. ``conftest.py`` leaves it out elsewhere."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch

from moe_dtensor.kernels.router import router_logits, top_k_gates

from .layer_cases import FLOAT8_CASES, ODD_CASES, Case, make_inputs, relative_errors, run

BACKENDS = ["torch", "triton", *(["quack"] if find_spec("quack") else [])]
LARGER = [
    Case(700, 256, 512, 8, 2, "swiglu"),
    Case(515, 264, 136, 7, 3, "geglu"),
    Case(1000, 384, 1032, 6, 4, "gelu", first_expert=2, held=3, rows="worst"),
    Case(300, 128, 128, 512, 32, "relu2"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ODD_CASES + LARGER, ids=str)
def test_bf16(backend, case, poisoned_memory):
    errors = relative_errors(case, backend, torch.bfloat16, "cuda")
    # Where a clamp begins, rounding decides whether a gradient goes through.
    assert max(errors.values()) < (3e-2 if case.activation == "swiglu_clamped" else 1e-2), errors


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", ODD_CASES[:4] + LARGER[:2], ids=str)
def test_fp32(backend, case, poisoned_memory):
    errors = relative_errors(case, backend, torch.float32, "cuda")
    assert max(errors.values()) < 1e-5, errors


FLOAT8_LARGER = [
    Case(700, 256, 512, 8, 2, "swiglu", float8=True),
    Case(3000, 4096, 2080, 4, 2, "swiglu", float8=True, keep=True),
]


@pytest.mark.parametrize("case", FLOAT8_CASES + FLOAT8_LARGER, ids=str)
def test_float8_in_bf16(case, poisoned_memory):
    """Against the reference with the same rounding; numbers near the middle between two of E4M3's go either way."""
    errors = relative_errors(case, "triton", torch.bfloat16, "cuda")
    # The reference in bfloat16 is as far from itself in float64: 2e-2, and 5e-2 where clamps begin.
    assert max(errors.values()) < (1e-1 if case.activation == "swiglu_clamped" else 3e-2), errors


def make_step(backend):
    case = Case(512, 256, 256, 8, 2, "swiglu")
    leaves, _, dy_TD = make_inputs(case, torch.bfloat16, "cuda")
    w_router_ED = torch.randn(case.E, case.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = [*leaves[:3], w_router_ED]

    def step():
        gate_TK, expert_TK = top_k_gates(router_logits(leaves[0], w_router_ED), case.K)
        y_TD = run(case, backend, [*leaves[:3], gate_TK], expert_TK)
        return torch.autograd.grad(y_TD, inputs, dy_TD)

    return step


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_sync(backend):
    step = make_step(backend)
    step()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend):
    step = make_step(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [grad.clone() for grad in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for grad in got:
        grad.fill_(float("nan"))
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# What torch's own compiler does, and hides only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiled_without_a_graph_break(backend):
    case = Case(512, 256, 256, 8, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.bfloat16, "cuda")
    expected = torch.autograd.grad(run(case, backend, leaves, expert_TK), leaves, dy_TD)
    compiled = torch.compile(lambda *tensors: run(case, backend, list(tensors), expert_TK), fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves, dy_TD)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_router_gradients_in_bf16():
    """The logits' gradient goes through bf16 products in two halves: far better than one bf16 rounding."""
    torch.manual_seed(0)
    x_TD = torch.randn(333, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_ED = torch.randn(24, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dlogits_TE = torch.randn(333, 24, device="cuda")
    logits_TE = router_logits(x_TD, w_ED)
    torch.testing.assert_close(logits_TE, x_TD.float() @ w_ED.float().T, rtol=1e-4, atol=1e-3)
    dx_TD, dw_ED = torch.autograd.grad(logits_TE, (x_TD, w_ED), dlogits_TE)
    torch.testing.assert_close(dx_TD, (dlogits_TE @ w_ED.float()).bfloat16(), rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(dw_ED, (dlogits_TE.T @ x_TD.float()).bfloat16(), rtol=8e-3, atol=1e-3)
