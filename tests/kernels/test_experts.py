from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moe_dtensor.kernels import mlp
from moe_dtensor.kernels.experts import choose_backend, expert_mlp

from .layer_cases import ODD_CASES, Case, make_inputs, relative_errors, run


def test_reference_gradients_are_those_of_finite_differences():
    case = Case(6, 3, 4, 4, 2, "swiglu", first_expert=1, held=2)
    leaves, expert_TK, _ = make_inputs(case, torch.float64)
    assert gradcheck(lambda *tensors: run(case, "reference", list(tensors), expert_TK), leaves)


@pytest.mark.parametrize("first_expert", [0, 1])
def test_an_id_of_minus_one_is_a_choice_with_a_gate_of_zero(first_expert):
    case = Case(9, 8, 8, 4, 3, "swiglu", first_expert=first_expert, held=3, absent=4)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float64)
    absent_TK = expert_TK == -1
    others = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    others[3].data[absent_TK] = 0
    y_TD, expected_TD = (
        run(case, "reference", leaves, expert_TK),
        run(case, "reference", others, expert_TK.clamp(min=0)),
    )
    torch.testing.assert_close(y_TD, expected_TD)
    got = torch.autograd.grad(y_TD, leaves, dy_TD)
    expected = torch.autograd.grad(expected_TD, others, dy_TD)
    assert (got[3][absent_TK] == 0).all()
    expected[3][absent_TK] = 0
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_torch_backend_equals_reference(case, poisoned_memory):
    errors = relative_errors(case, "torch", torch.float32)
    assert max(errors.values()) < 1e-5, errors


def test_bf16_agrees_with_float64():
    errors = relative_errors(Case(64, 32, 48, 4, 2, "swiglu"), "torch", torch.bfloat16)
    assert 1e-4 < max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize(("activation", "groups"), [("swiglu", 2), ("gelu", 1)])
def test_bytes_kept_are_the_input_the_up_projection_and_the_route(activation, groups):
    case = Case(64, 32, 48, 4, 2, activation)
    leaves, expert_TK, _ = make_inputs(case, torch.bfloat16)
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:3]}
    kept: dict[int, int] = {}

    def pack(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run(case, "torch", leaves, expert_TK)
    copies = case.T * case.K
    # The route: position and copy (int32), the gate (float32), and the experts' ends.
    route = 3 * 4 * copies + 4 * case.E
    assert sum(kept.values()) == 2 * case.T * case.D + 2 * groups * copies * case.F + route


def test_weight_gradients_can_run_apart(monkeypatch):
    """Zero-bubble schedules take input gradients first and weight gradients later: no GEMM may run twice."""
    calls = []
    for name in ("rows_times_weight", "weight_gradient"):
        monkeypatch.setattr(mlp, name, _counted(getattr(mlp, name), name, calls))
    case = Case(37, 16, 24, 5, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    whole = torch.autograd.grad(run(case, "torch", leaves, expert_TK), leaves, dy_TD)
    y_TD = run(case, "torch", leaves, expert_TK)
    # torch 2.11 lets Python nodes die when stage_backward_input detaches the output, unless something above them lives.
    above = y_TD.view_as(y_TD)
    calls.clear()
    _, groups = stage_backward_input([y_TD], [dy_TD], [leaves[0], leaves[3]], iter(leaves[1:3]))
    assert calls == ["rows_times_weight"] * 2
    calls.clear()
    stage_backward_weight(iter(leaves[1:3]), groups)
    assert calls == ["weight_gradient"] * 2
    del above
    for leaf, expected in zip(leaves, whole, strict=True):
        assert torch.equal(leaf.grad, expected)


def _counted(function, name, calls):
    def counted(*args):
        calls.append(name)
        return function(*args)

    return counted


def test_weight_gradients_are_complete_before_the_inputs():
    """FSDP reduces a block's gradients when the gradient of its input arrives."""
    case = Case(37, 16, 24, 5, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    order = []
    for name, leaf in zip(("x", "w_up", "w_down"), leaves[:3], strict=True):
        leaf.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    run(case, "torch", leaves, expert_TK).backward(dy_TD)
    assert order == ["w_down", "w_up", "x"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    case = Case(37, 16, 24, 5, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    expected = torch.autograd.grad(run(case, "torch", leaves, expert_TK), leaves, dy_TD)
    compiled = torch.compile(
        lambda *tensors: run(case, "torch", list(tensors), expert_TK), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(*leaves), leaves, dy_TD)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("backend", "sizes", "message"),
    [
        ("torch", (20, 16), "multiples of 8"),
        ("torch", (16, 20), "multiples of 8"),
        ("triton", (16, 16), "runs on CUDA"),
        ("grouped_gemm", (16, 16), "runs on CUDA"),
        ("fast", (16, 16), "not known"),
    ],
)
def test_sizes_and_devices_a_backend_cannot_take_are_refused_by_name(backend, sizes, message):
    case = Case(4, *sizes, 4, 2, "swiglu")
    leaves, expert_TK, _ = make_inputs(case, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        run(case, backend, leaves, expert_TK)


def test_missing_package_says_how_to_get_it():
    from moe_dtensor.kernels.grouped import backend_module

    with pytest.raises(ValueError, match="pip install"):
        backend_module("grouped_gemm").rows_times_weight(*[torch.ones(1, 1, dtype=torch.int64)] * 4, True)


def test_auto_is_the_reference_on_cpu():
    leaves, expert_TK, _ = make_inputs(Case(4, 16, 16, 4, 2, "swiglu"), torch.float32)
    assert choose_backend("auto", leaves[0], leaves[1]) == "reference"
    wrong = expert_TK.int()
    with pytest.raises(ValueError, match="int64"):
        expert_mlp(*leaves, wrong, activation="swiglu", backend="auto")


def test_a_number_of_rows_is_what_is_allocated_without_reading_the_device(monkeypatch):
    case = Case(37, 16, 24, 5, 2, "swiglu", first_expert=1, held=2, rows=70)
    leaves, expert_TK, _ = make_inputs(case, torch.float32)
    made = []
    gather_rows = mlp.gather_rows
    monkeypatch.setattr(
        mlp, "gather_rows", lambda x, position, rows, phase: made.append(rows) or gather_rows(x, position, rows, phase)
    )
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: pytest.fail("read the device"))
    run(case, "torch", leaves, expert_TK)
    assert made == [70]
    with pytest.raises(ValueError, match="a number of rows"):
        expert_mlp(*leaves, expert_TK, activation="swiglu", rows="few")
