"""The oracle's experts in float8: rounding against a table of all numbers of E4M3, the rule of the gradients number by
number.

D width, G up-projections, F hidden width, T tokens, E experts, K choices.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.verify import oracle_float8
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.oracle import Transformer, one_step
from moe_dtensor.verify.oracle_float8 import e4m3, expert, product, rounded
from moe_dtensor.verify.oracle_routing import Balance

NUMBERS = [(1 + f / 8) * 2.0**e if e > -7 else f / 8 * 2.0**-6 for e in range(-7, 9) for f in range(8)][:-1]
"""Not negative, in order: every even one has an even fraction. The last would be 480, which is NaN."""
TINY = {
    "model.num_layers": 2,
    "model.dim": 12,
    "model.num_heads": 2,
    "model.head_dim": 4,
    "model.hidden_dim": 10,
    "model.vocab_size": 20,
    "moe.num_experts": 4,
    "moe.hidden_dim": 6,
    "moe.num_shared_experts": 1,
    "moe.expert_dtype": "float8",
    "training.seq_len": 5,
    "training.global_batch_size": 2,
    "training.microbatch_size": 1,
    "training.param_dtype": "float64",
}


def tiny(changes: dict[str, Any]) -> Config:
    return resolve(override(Config(), TINY | changes), 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(value: float) -> float:
    """By a search of the table; of two as near the even one."""
    distance = [abs(number - abs(value)) for number in NUMBERS]
    close = [i for i, d in enumerate(distance) if d == min(distance)]
    return math.copysign(NUMBERS[close[0] if len(close) == 1 or close[0] % 2 == 0 else close[1]], value)


def by_table(values: Tensor) -> Tensor:
    """R of a vector, S of a weight."""
    numbers = values.flatten().tolist()
    largest = max(max(abs(x) for x in numbers), 1e-30)
    found = [nearest(x * (448 / largest)) * (largest / 448) for x in numbers]
    return torch.tensor(found, dtype=torch.float64).view(values.shape)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def swiglu(up: Tensor, gate: Tensor | None) -> Tensor:
    assert gate is not None
    return up * gate / (1 + (-gate).exp())


def test_the_table_is_torchs() -> None:
    bits = torch.arange(127, dtype=torch.uint8)
    assert bits.view(torch.float8_e4m3fn).double().tolist() == NUMBERS


def test_every_number_rounds_to_the_nearest_and_ties_to_even() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(NUMBERS)]
    besides = [t * (1 + s) for t in ties for s in (-1e-14, 1e-14)]
    spread = (448 * (10 ** (-6 * torch.rand(3000, generator=torch.Generator().manual_seed(1)).double()))).tolist()
    values = [*NUMBERS, *ties, *besides, *spread]
    values = torch.tensor(values + [-v for v in values], dtype=torch.float64)
    assert e4m3(values).tolist() == [nearest(v) for v in values.tolist()]
    assert len(set(e4m3(values).abs().tolist())) == len(NUMBERS)
    narrow = values.float()
    assert torch.equal(e4m3(narrow), narrow.to(torch.float8_e4m3fn).float())


def test_float64_is_rounded_once() -> None:
    """By way of float32 this would be the middle of 1 and 1.125, and so 1."""
    assert e4m3(torch.tensor(1.0625 + 1e-10, dtype=torch.float64)) == 1.125
    assert e4m3(torch.tensor(1.0625, dtype=torch.float64)) == 1


def test_a_vector_by_hand() -> None:
    # 64 to 128 in steps of 8, 2 to 4 of 1/4, 1/2 to 1 of 1/16; 100 and 108 lie between two.
    v = torch.tensor([448.0, 100.0, -108.0, 3.3, -0.7, 0.0], dtype=torch.float64)
    expected = torch.tensor([448.0, 96.0, -112.0, 3.25, -0.6875, 0.0], dtype=torch.float64)
    assert torch.equal(rounded(v), expected)
    assert torch.equal(rounded(v / 64), expected / 64), "the scale follows the largest"
    assert torch.equal(rounded(-v), -expected)


def test_a_weight_has_one_scale() -> None:
    weight = draw(2, 3, 4)
    weight[1] /= 100
    torch.testing.assert_close(rounded(weight), by_table(weight), rtol=1e-15, atol=0)
    assert not torch.allclose(rounded(weight)[1], rounded(weight[1]), rtol=1e-3)


def test_a_product_by_hand() -> None:
    weight = torch.tensor([[448.0, 100.0], [3.3, -0.7]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([7.0, 1.0], dtype=torch.float64, requires_grad=True)  # 64 times as large: 448 and 64, exact
    gate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = product(weight)(x, gate)
    torch.testing.assert_close(y, 0.3 * torch.tensor([448.0 * 7 + 96, 3.25 * 7 - 0.6875], dtype=torch.float64))
    y.backward(torch.tensor([448.0, 108.0], dtype=torch.float64))  # 108 becomes 112 on its way to x, not to the weight
    back = torch.tensor([448.0 * 448 + 3.25 * 112, 96 * 448.0 - 0.6875 * 112], dtype=torch.float64)
    torch.testing.assert_close(x.grad, 0.3 * back)
    torch.testing.assert_close(gate.grad, back[0] * 7 + back[1])
    expected = 0.3 * torch.tensor([[448.0 * 7, 448], [108.0 * 7, 108]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected)


def test_an_expert_number_by_number() -> None:
    width, hidden, g = 5, 4, 0.37
    up, down, x, dy = draw(2, hidden, width), draw(width, hidden, seed=1), draw(width, seed=2), draw(width, seed=3)
    tensors = [t.clone().requires_grad_() for t in (up, down, x, torch.tensor(g, dtype=torch.float64))]
    y = expert(tensors[0], tensors[1], swiglu)(tensors[2], tensors[3])
    y.backward(dy)
    y = y.detach()

    s_up, s_down, r_x, r_dy = by_table(up), by_table(down), by_table(x), by_table(dy)
    h = [[sum(float(s_up[p, f, d] * r_x[d]) for d in range(width)) for f in range(hidden)] for p in range(2)]
    a = torch.tensor([h[1][f] * h[0][f] * sigmoid(h[0][f]) for f in range(hidden)], dtype=torch.float64)
    r_a = by_table(a)
    back = [sum(float(s_down[d, f] * r_dy[d]) for d in range(width)) for f in range(hidden)]
    slope = [sigmoid(t) * (1 + t * (1 - sigmoid(t))) for t in h[0]]
    dh = torch.tensor(
        [
            [g * back[f] * h[1][f] * slope[f] for f in range(hidden)],
            [g * back[f] * h[0][f] * sigmoid(h[0][f]) for f in range(hidden)],
        ],
        dtype=torch.float64,
    )
    r_dh = by_table(dh)  # one scale for both halves
    for d in range(width):
        expected = g * sum(float(s_down[d, f] * r_a[f]) for f in range(hidden))
        assert float(y[d]) == pytest.approx(expected, rel=1e-12)
        dx = sum(float(s_up[p, f, d] * r_dh[p, f]) for p in range(2) for f in range(hidden))
        assert float(tensors[2].grad[d]) == pytest.approx(dx, rel=1e-12)
        for f in range(hidden):
            assert float(tensors[1].grad[d, f]) == pytest.approx(g * float(dy[d] * a[f]), rel=1e-12)
            for p in range(2):
                assert float(tensors[0].grad[p, f, d]) == pytest.approx(float(dh[p, f] * x[d]), rel=1e-12)
    assert float(tensors[3].grad) == pytest.approx(sum(back[f] * float(a[f]) for f in range(hidden)), rel=1e-12)


def test_rounding_matters() -> None:
    up, down, x, dy = draw(2, 24, 32), draw(32, 24, seed=1), draw(32, seed=2), draw(32, seed=3)
    found = []
    for narrow in (True, False):
        tensors = [t.clone().requires_grad_() for t in (up, down, x, torch.tensor(0.4, dtype=torch.float64))]
        if narrow:
            y = expert(tensors[0], tensors[1], swiglu)(tensors[2], tensors[3])
        else:
            gate, hidden = tensors[0] @ tensors[2]
            y = tensors[3] * (tensors[1] @ swiglu(hidden, gate))
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in tensors)])
    for narrow, plain in zip(*found, strict=True):
        assert 0.003 < float((narrow - plain).norm() / plain.norm()) < 0.2


def test_zeros_stay_zeros() -> None:
    assert torch.equal(rounded(torch.zeros(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    up, down, x = draw(2, 4, 5).requires_grad_(), draw(5, 4, seed=1).requires_grad_(), torch.zeros(5).double()
    y = expert(up, down, swiglu)(x.requires_grad_(), 0.5)
    y.backward(torch.zeros(5).double())
    for tensor in (y, x.grad, up.grad, down.grad):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    none = expert(torch.zeros_like(up), torch.zeros_like(down), swiglu)(draw(5), 1.0)
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_through(bad: float) -> None:
    up, down, x, dy = draw(2, 4, 5), draw(5, 4, seed=1), draw(5, seed=2), draw(5, seed=3)
    for where in ("up", "down", "x", "dy"):
        own = {"up": up.clone(), "down": down.clone(), "x": x.clone(), "dy": dy.clone()}
        own[where].flatten()[2] = bad
        for name in ("up", "down", "x"):
            own[name].requires_grad_()
        y = expert(own["up"], own["down"], swiglu)(own["x"], 1.0)
        y.backward(own["dy"])
        assert where == "dy" or not y.isfinite().any()
        assert not own["x"].grad.isfinite().any()


@pytest.mark.parametrize("gate_on", ["output", "input"])
def test_the_block_is_the_rule_for_every_choice(gate_on: str) -> None:
    config = tiny({"moe.gate_on": gate_on, "moe.top_k": 2 if gate_on == "output" else 1, "moe.router": "topk"})
    weights = {name: value.double() for name, value in initial_values(config).items()}
    balance = {i: Balance(torch.zeros(4), [0] * 4) for i in range(2)}
    model, (microbatch, _), x_TD = Transformer(config, weights, balance), global_batch(config), draw(5, 12)
    y_TD = model._experts(1, x_TD, microbatch)
    (routed,) = model.routed[1]
    expected_TD = model._feed_forward("layers.1.moe.shared.", x_TD)
    w_up, w_down = (weights[f"layers.1.moe.experts.{name}"] for name in ("w_up", "w_down"))
    for t, k in itertools.product(range(5), range(config.moe.top_k)):
        e, g = int(routed.chosen_TK[t, k]), float(routed.gate_TK[t, k])
        before, after = (g, 1.0) if gate_on == "input" else (1.0, g)
        gate, hidden = by_table(w_up[e]) @ by_table(before * x_TD[t])
        expected_TD[t] += after * (by_table(w_down[e]) @ by_table(swiglu(hidden, gate)))
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)


def test_a_step_rounds_in_every_moe_block_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny({"model.mtp_depth": 1, "moe.layers": (1,)})
    weights, batch = initial_values(config), global_batch(config)
    shapes: list[tuple[int, ...]] = []
    right = oracle_float8.rounded

    def noted(v: Tensor) -> Tensor:
        shapes.append(tuple(v.shape))
        return right(v)

    monkeypatch.setattr(oracle_float8, "rounded", noted)
    answer = one_step(config, weights, batch)
    # Two microbatches through two MoE blocks, of which the later token's is one, and an evaluation without that.
    blocks = 2 * 2 + 2
    assert shapes.count((12, 12)) == shapes.count((12, 6)) == blocks * 4
    assert set(shapes) == {(12, 12), (12, 6), (12,), (6,)}
    plain = one_step(override(config, {"moe.expert_dtype": "param"}), weights, batch)
    for name, right_gradient in plain.gradients.items():
        error = float((answer.gradients[name] - right_gradient).norm() / right_gradient.norm())
        assert 1e-4 < error < 0.5, (name, error)
