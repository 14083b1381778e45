"""What evens out or limits the load: capacity, groups of experts, losses, biases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.balance import AddLoss, balance_loss, chosen_mask, within_capacity
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.transformer import Transformer

from .routers import EXPERTS, LENGTH, SEQUENCES, build_router, load, route, vectors


@pytest.mark.parametrize("router", ["sinkhorn", "topk", "uniform"])
@pytest.mark.parametrize("by", ["score", "position"])
@pytest.mark.parametrize("group", [1, 4])
def test_capacity_is_never_exceeded_and_filled_where_it_could_be(router: str, by: str, group: int) -> None:
    keys = {"router": router, "group_sequences": group}
    free = route(build_router(**keys)).expert_BSK
    routing = route(build_router(**keys, capacity_factor=1.0, drop_by=by))
    most = group * LENGTH * 2 // EXPERTS
    for start in range(0, SEQUENCES, group):
        wanted, taken = load(free[start : start + group]), load(routing.expert_BSK[start : start + group])
        assert torch.equal(taken, wanted.clamp(max=most))
    assert torch.equal(routing.record_R[:EXPERTS], load(free).double()), "counted before any is dropped"


def test_what_is_kept_scores_higher_than_what_is_dropped() -> None:
    router = build_router(router="topk", capacity_factor=0.5)
    gate, expert, _ = route(router)
    free = route(build_router(router="topk")).expert_BSK
    for e in range(EXPERTS):
        kept, dropped = gate[expert == e], gate[(free == e) & (expert == -1)]
        if len(dropped):
            assert kept.min() > dropped.max()


def test_among_equal_gates_the_earlier_token_stays() -> None:
    gate = torch.full((1, 6, 1), 0.5, dtype=torch.float64) + torch.randn(1, 6, 1, dtype=torch.float64) * 1e-15
    kept = within_capacity(gate, torch.zeros(1, 6, 1, dtype=torch.int64), 2, 2, "score")
    assert kept.flatten().tolist() == [True, True, False, False, False, False]


def test_by_position_first_choices_come_before_second_ones() -> None:
    expert = torch.tensor([[[1, 0], [0, 1], [0, 1]]])
    kept = within_capacity(torch.zeros(1, 3, 2), expert, 2, 2, "position")
    assert kept.tolist() == [[[True, False], [True, True], [True, False]]]


@pytest.mark.parametrize("router", ["sinkhorn", "topk"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_token_never_goes_to_more_groups_of_experts_than_are_kept(router: str, kept: int) -> None:
    limited = route(build_router(router=router, expert_groups=4, expert_groups_kept=kept)).expert_BSK
    free = route(build_router(router=router)).expert_BSK
    groups = [len({e // 2 for e in row}) for row in limited.flatten(0, 1).tolist()]
    assert max(groups) <= kept
    assert load(limited).sum() == load(free).sum()
    assert not torch.equal(limited, free)


def test_all_groups_kept_is_no_limit() -> None:
    limited = route(build_router(router="topk", expert_groups=4, expert_groups_kept=4)).expert_BSK
    assert torch.equal(limited, route(build_router(router="topk")).expert_BSK)


def test_balance_loss_is_1_where_all_is_even_and_e_where_all_goes_to_one() -> None:
    logits = torch.zeros(2, 3, 4)
    even = balance_loss(logits, torch.ones(2, 4), "softmax")
    assert even.item() == pytest.approx(6.0)
    logits[..., 1] = 50.0
    one = balance_loss(logits, torch.tensor([[0, 9, 0, 0]]).expand(2, 4), "softmax")
    assert one.item() == pytest.approx(6.0 * 4)
    assert balance_loss(logits, torch.zeros(2, 4), "softmax").item() == pytest.approx(6.0), "no load yet counts as even"


def gradient_of_weight(over: str, x: Tensor | None = None, **keys: object) -> Tensor:
    router = build_router(router="topk", balance_loss=0.1, balance_over=over, **keys)
    (route(router, x).gate_BSK * 0).sum().backward()
    assert router.weight.grad is not None
    return router.weight.grad


def test_sequence_group_and_batch_are_what_they_say() -> None:
    sequence, group = gradient_of_weight("sequence"), gradient_of_weight("group")
    assert not torch.allclose(sequence, group)
    torch.testing.assert_close(gradient_of_weight("group", group_sequences=1), sequence)
    assert gradient_of_weight("batch").abs().max() < 1e-12, "before the first step all is even"


def test_the_balancing_loss_sends_tokens_to_others() -> None:
    router = build_router(router="topk", balance_loss=1.0)
    before = load(route(router).expert_BSK).double().std()
    optimizer = torch.optim.SGD([router.weight], lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        (route(router).gate_BSK * 0).sum().backward()
        optimizer.step()
    assert load(route(router).expert_BSK).double().std() < before / 3


def test_a_loss_that_is_added_changes_no_value_and_is_counted_once() -> None:
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    z = AddLoss.apply(x, (y**2).sum())
    assert torch.equal(z, x)
    (5 * z).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 5.0))
    torch.testing.assert_close(y.grad, 2 * y.detach())


def test_chosen_mask() -> None:
    ids = torch.tensor([[2, 0], [-1, 1], [-1, -1]])
    assert chosen_mask(ids, 3).tolist() == [[True, False, True], [False, True, False], [False, False, False]]


def balance_state(**keys: object) -> tuple[BalanceState, Transformer]:
    values = {"model.num_layers": 3, "moe.layers": (0, 2), "moe.num_experts": 4, "model.dim": 16, "model.num_heads": 2}
    config = resolve(override(Config(), values | {"model.vocab_size": 64} | keys), 1)
    part = Transformer(config, range(3))
    return BalanceState(config, [part], torch.device("cpu")), part


def test_routers_see_their_row_of_the_state() -> None:
    state, part = balance_state(**{"moe.bias_rate": 0.5})
    state.step(torch.tensor([[4.0, 0, 2, 2], [2, 2, 2, 2]]), torch.tensor(True))
    first, second = (part.get_submodule(f"layers.{i}.moe.router") for i in (0, 2))
    assert first.bias.tolist() == [-0.5, 0.5, 0, 0]
    assert second.bias.tolist() == [0, 0, 0, 0]
    assert first.previous_load.tolist() == [4, 0, 2, 2]
    other, _ = balance_state(**{"moe.bias_rate": 0.5})
    other.load_state_dict(state.state_dict())
    assert torch.equal(other.bias_LE, state.bias_LE)


def test_a_step_that_is_not_finite_moves_no_bias() -> None:
    state, _ = balance_state(**{"moe.bias_rate": 0.5})
    churn = state.step(torch.tensor([[4.0, 0, 2, 2], [2, 2, 2, 2]]), torch.tensor(False))
    assert (state.bias_LE == 0).all()
    assert churn.tolist() == [0, 0], "there was no step before"
    churn = state.step(torch.tensor([[2.0, 2, 2, 2], [8, 0, 0, 0]]), torch.tensor(True))
    assert churn.tolist() == [0.25, 0.75]


def test_without_a_rate_the_bias_stays_as_it_was_loaded() -> None:
    state, part = balance_state(**{"moe.selection_bias": True})
    part.to(torch.bfloat16)
    loaded = torch.rand(2, 4)
    state.load_state_dict({"bias": loaded, "previous_load": torch.zeros(2, 4)})
    state.step(torch.tensor([[4.0, 0, 2, 2], [2, 2, 2, 2]]), torch.tensor(True))
    assert torch.equal(state.state_dict()["bias"], loaded), "float32, whatever the model's dtype"


def test_the_bias_balances() -> None:
    router = build_router(router="topk", bias_rate=0.005, score="sigmoid")
    state, _ = balance_state(**{"moe.bias_rate": 0.005, "moe.layers": (1,), "moe.num_experts": EXPERTS})
    router.bias = state.bias_LE[0]
    with torch.no_grad():
        router.weight.mul_(0.2)
    x = vectors()
    first = load(route(router, x).expert_BSK)
    for _ in range(150):
        state.step(load(route(router, x).expert_BSK).double()[None], torch.tensor(True))
    last = load(route(router, x).expert_BSK)
    assert first.max() > 2 * first.double().mean()
    assert last.max() < 1.3 * last.double().mean()
