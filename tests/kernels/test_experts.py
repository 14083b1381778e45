from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.multiprocessing.reductions import StorageWeakRef

from moe_dtensor.kernels.experts import autograd
from moe_dtensor.kernels.experts.mlp import choose_backend, expert_mlp

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


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("activation", "groups"), [("swiglu", 2), ("gelu", 1)])
def test_bytes_kept_are_the_input_the_up_projection_and_the_route(activation, groups, split, keep):
    case = Case(64, 32, 48, 4, 2, activation, split=split, keep=keep)
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
    tokens = copies if keep else case.T
    assert sum(kept.values()) == 2 * tokens * case.D + 2 * groups * copies * case.F + route


# Before torch 2.13, nodes written in Python die when stage_backward_input detaches a stage's output.
ORDERS = ["together", "apart"] if torch.__version__ >= (2, 13) else ["together"]


@pytest.mark.parametrize("order", ORDERS)
def test_no_gemm_runs_twice(order, monkeypatch):
    """Zero-bubble schedules take input gradients first and weight gradients later."""
    calls = []
    for name in ("rows_times_weight", "weight_gradient"):
        monkeypatch.setattr(autograd, name, _counted(getattr(autograd, name), name, calls))
    case = Case(37, 16, 24, 5, 2, "swiglu", split=True)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    whole = torch.autograd.grad(run(case, "torch", leaves, expert_TK), leaves, dy_TD)
    y_TD = run(case, "torch", leaves, expert_TK)
    calls.clear()
    if order == "together":
        y_TD.backward(dy_TD)
        assert sorted(calls) == ["rows_times_weight"] * 2 + ["weight_gradient"] * 2
    else:
        _, groups = stage_backward_input([y_TD], [dy_TD], [leaves[0], leaves[3]], iter(leaves[1:3]))
        assert calls == ["rows_times_weight"] * 2
        calls.clear()
        stage_backward_weight(iter(leaves[1:3]), groups)
        assert calls == ["weight_gradient"] * 2
    for leaf, expected in zip(leaves, whole, strict=True):
        assert torch.equal(leaf.grad, expected)


def _counted(function, name, calls):
    def counted(*args):
        calls.append(name)
        return function(*args)

    return counted


@pytest.mark.parametrize("split", [False, True])
def test_weight_gradients_are_complete_before_the_inputs(split):
    """FSDP reduces a block's gradients when the gradient of its input arrives."""
    case = Case(37, 16, 24, 5, 2, "swiglu", split=split)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    order = []
    for name, leaf in zip(("w_up", "w_down"), leaves[1:3], strict=True):
        leaf.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    x_TD = leaves[0] * 1
    x_TD.grad_fn.register_prehook(lambda _: order.append("x"))
    run(case, "torch", [x_TD, *leaves[1:]], expert_TK).backward(dy_TD)
    assert sorted(order[:2]) == ["w_down", "w_up"]
    assert order[2:] == ["x"]


@pytest.mark.parametrize("split", [False, True])
def test_a_retained_graph_runs_again(split):
    """One node drops what was saved while it runs, but not if it is to run again."""
    case = Case(37, 16, 24, 5, 2, "swiglu", split=split)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    y_TD = run(case, "torch", leaves, expert_TK)
    first = torch.autograd.grad(y_TD, leaves, dy_TD, retain_graph=True)
    second = torch.autograd.grad(y_TD, leaves, dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y_TD, leaves, dy_TD)


def test_the_up_projection_is_freed_before_a_weight_gradient_is_made(monkeypatch):
    case = Case(37, 16, 24, 5, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    alive, freed = [], []
    rows_times_weight, weight_gradient = autograd.rows_times_weight, autograd.weight_gradient

    def watched(*args):
        out = rows_times_weight(*args)
        alive.append(StorageWeakRef(out.untyped_storage()))
        return out

    def checked(*args):
        freed.append(alive[0].expired())
        return weight_gradient(*args)

    monkeypatch.setattr(autograd, "rows_times_weight", watched)
    monkeypatch.setattr(autograd, "weight_gradient", checked)
    y_TD = run(case, "torch", leaves, expert_TK)
    assert not alive[0].expired()
    y_TD.backward(dy_TD)
    assert freed == [True, True]


@pytest.mark.parametrize("index", range(4))
def test_gradients_of_some_inputs(index):
    case = Case(37, 16, 24, 5, 2, "swiglu")
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    whole = torch.autograd.grad(run(case, "torch", leaves, expert_TK), leaves, dy_TD)
    some = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(leaves)]
    (got,) = torch.autograd.grad(run(case, "torch", some, expert_TK), some[index], dy_TD)
    assert torch.equal(got, whole[index])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("split", [False, True])
def test_compiles_without_a_graph_break(split):
    case = Case(37, 16, 24, 5, 2, "swiglu", split=split)
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
    from moe_dtensor.kernels.experts.grouped import ByPackage

    with pytest.raises(ValueError, match="pip install"):
        ByPackage.rows_times_weight(*[torch.ones(1, 1, dtype=torch.int64)] * 4, True)


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
    permute = autograd.permute
    monkeypatch.setattr(autograd, "permute", lambda *args: made.append(args[2]) or permute(*args))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: pytest.fail("read the device"))
    run(case, "torch", leaves, expert_TK)
    assert made == [70]
    with pytest.raises(ValueError, match="a number of rows"):
        expert_mlp(*leaves, expert_TK, activation="swiglu", rows="few")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_rows_read_from_the_device_stay_in_the_compiled_graph():
    case = Case(48, 16, 32, 8, 2, "swiglu", held=4)
    leaves, expert_TK, dy_TD = make_inputs(case, torch.float32)
    compiled = torch.compile(
        lambda *tensors: run(case, "torch", list(tensors[:4]), tensors[4]),
        backend="aot_eager_decomp_partition",
        fullgraph=True,
    )
    kept: list[tuple[int, ...]] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(x.shape))
        return x

    for seed in range(2):
        torch.manual_seed(seed)
        kept.clear()
        routed_TK = expert_TK[torch.randperm(len(expert_TK))]
        expected = torch.autograd.grad(run(case, "torch", leaves, routed_TK), leaves, dy_TD)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y_TD = compiled(*leaves, routed_TK)
        got = torch.autograd.grad(y_TD, leaves, dy_TD)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        rows = int((routed_TK < case.held).sum())
        assert [shape for shape in kept if len(shape) == 2 and shape[0] == rows] == [(rows, 2 * case.F)]
