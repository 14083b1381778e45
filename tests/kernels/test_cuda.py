"""On a GPU only: sizes of real layers, no host sync, CUDA graphs. ``conftest.py`` leaves it out elsewhere."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from moe_dtensor.bench.layer import graphed_calls
from moe_dtensor.bench.shapes import Layer, parse_shape
from moe_dtensor.config.check_model import has_flash_attention_4
from moe_dtensor.kernels.attention import Visible, attend
from moe_dtensor.kernels.router import router_logits, top_k_gates

from .layer_cases import FLOAT8_CASES, ODD_CASES, Case, make_inputs, relative_errors, run

# Of the packages of extras, as they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

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
    check_no_host_sync(make_step(backend))


def check_no_host_sync(step):
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
    check_cuda_graph(make_step(backend))


def check_cuda_graph(step):
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


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_that_autograd_calls(backend):
    layer = Layer(parse_shape("512,256,256,8,2,swiglu"), "0", torch.device("cuda"), torch.bfloat16, compiled=False)
    call = graphed_calls(layer, backend)
    for _ in range(2):
        layer.step(backend)
        expected = [leaf.grad.clone() for leaf in layer.leaves.values()]
        call()
        for leaf, right in zip(layer.leaves.values(), expected, strict=True):
            assert torch.equal(leaf.grad, right)
        with torch.no_grad():
            layer.x_TD.mul_(-0.5)


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


HAS_FLASH = has_flash_attention_4() and torch.cuda.get_device_capability() >= (9, 0)
needs_flash = pytest.mark.skipif(not HAS_FLASH, reason="needs flash-attn-4, and a GPU of Hopper or later")
# Sequences, positions, heads, key and value heads, width, values' width.
ATTENTION = [(2, 500, 8, 8, 64, 64), (2, 300, 8, 2, 128, 128), (1, 257, 4, 4, 192, 128), (3, 65, 2, 1, 24, 24)]


def attention_leaves(shape):
    """q, k and v as layers give them: heads beside one another, values a part of something wider."""
    batch, length, heads, kv_heads, width, value_width = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width + 64))
    q, k, v = (torch.randn(batch, length, *size, generator=generator, device="cuda").bfloat16() for size in sizes)
    return [t.transpose(1, 2).requires_grad_() for t in (q, k, v[..., 64:])]


def by_flash(q, k, v):
    return attend(q, k, v, Visible(None, None), scale=0.1, backend="fa4")


def flash_step(shape):
    leaves = attention_leaves(shape)
    dy = torch.ones_like(by_flash(*leaves))
    return lambda: torch.autograd.grad(by_flash(*leaves), leaves, dy)


@needs_flash
@pytest.mark.filterwarnings("ignore")  # of the package's compiler, and of torch's
@pytest.mark.parametrize("way", ["eager", "deterministic", "compiled"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_flash_attention_in_bf16(shape, way, request):
    if way == "deterministic":
        request.getfixturevalue("poisoned_memory")
    leaves = attention_leaves(shape)
    run = torch.compile(by_flash, fullgraph=True) if way == "compiled" else by_flash
    y = run(*leaves)
    dy = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, leaves, dy)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    right = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.1, enable_gqa=True)
    expected = right, *torch.autograd.grad(right, wide, dy.float())
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-2, errors


@needs_flash
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_a_deterministic_run_is_the_same_again(shape, poisoned_memory):
    step = flash_step(shape)
    for a, b in zip(step(), step(), strict=True):
        assert torch.equal(a, b)


@needs_flash
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", [check_no_host_sync, check_cuda_graph])
def test_flash_attention_asks_the_host_for_nothing(check, poisoned_memory):
    check(flash_step(ATTENTION[0]))
