"""The oracle's routing, judged by hand and by finite differences of the whole objective."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.verify import oracle_routing as routing
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.oracle import one_step, steps
from moe_dtensor.verify.oracle_routing import Balance, Place

TINY = {
    "model.num_layers": 2,
    "model.dim": 12,
    "model.num_heads": 2,
    "model.head_dim": 4,
    "model.hidden_dim": 10,
    "model.vocab_size": 20,
    "moe.num_experts": 4,
    "moe.hidden_dim": 6,
    "moe.router": "topk",
    "training.seq_len": 5,
    "training.global_batch_size": 4,
    "training.microbatch_size": 2,
    "training.param_dtype": "float64",
}


def tiny(**changes: object) -> Config:
    return resolve(override(Config(), TINY | {key.replace("__", "."): value for key, value in changes.items()}), 1)


def at(tokens: int, group: int = 0) -> Place:
    size = group or tokens
    groups = [range(i, i + size) for i in range(0, tokens, size)]
    return Place(0, range(tokens), range(tokens), groups, groups)


def none(experts: int = 4) -> Balance:
    return Balance(torch.zeros(experts), [0] * experts)


@pytest.mark.parametrize(
    "coefficients", [{"balance_loss": 0.7, "balance_over": over} for over in ("sequence", "group")] + [{"z_loss": 0.3}]
)
def test_auxiliary_losses_are_in_the_gradient_and_not_in_the_loss(coefficients: dict[str, object]) -> None:
    """The slope of ``loss + coefficient * mean over tokens, summed over layers``, taken from the diagnostics."""
    config = tiny(**{f"moe__{key}": value for key, value in coefficients.items()})
    weights, batch = initial_values(config), global_batch(config)

    def objective(values: dict[str, torch.Tensor]) -> float:
        answer = one_step(config, values, batch)
        means = answer.means.values()
        return answer.loss + sum(
            config.moe.balance_loss * m["balance_loss"] + config.moe.z_loss * m["router_z"] for m in means
        )

    answer = one_step(config, weights, batch)
    assert answer.loss == one_step(tiny(), weights, batch).loss
    generator = torch.Generator().manual_seed(1)
    for name in ("layers.0.moe.router.weight", "layers.1.moe.router.weight", "tok_embeddings.weight"):
        direction = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / direction.norm()
        ends = [objective(weights | {name: weights[name] + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert torch.isclose((answer.gradients[name] * direction).sum(), slope, rtol=1e-5, atol=1e-8), name


def test_balance_loss_by_hand() -> None:
    """Two tokens, both to expert 0 of two: f = (1, 0), so the loss is E times the sum of P_0."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    config = tiny(moe__num_experts=2, moe__top_k=1, moe__balance_loss=1.0)
    routed = routing.route(config, logits, at(2), none(2))
    assert float(routed.auxiliary) == pytest.approx(2 * float(logits.softmax(1)[:, 0].sum()), rel=1e-14)
    assert routed.sums["balance_loss"] == pytest.approx(float(routed.auxiliary), rel=1e-14)


def test_balance_loss_of_the_batch_takes_the_step_before() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    config = tiny(moe__num_experts=2, moe__top_k=1, moe__balance_loss=1.0, moe__balance_over="batch")
    first = routing.route(config, logits, at(2), none(2))
    assert float(first.auxiliary) == pytest.approx(2.0, rel=1e-14)
    later = routing.route(config, logits, at(2), Balance(torch.zeros(2), [0, 7]))
    assert float(later.auxiliary) == pytest.approx(2 * float(logits.softmax(1)[:, 1].sum()), rel=1e-14)


def test_bias_moves_toward_the_average_and_only_the_choice_sees_it() -> None:
    state = none().after(0.1, [4, 0, 2, 2]).after(0.1, [3, 3, 1, 1])
    rate = torch.tensor(0.1)
    assert torch.equal(state.bias, torch.stack([-rate - rate, rate - rate, rate, rate]))
    assert state.previous == [3, 3, 1, 1]
    logits = torch.zeros(1, 4, dtype=torch.float64)
    routed = routing.route(tiny(moe__bias_rate=0.1), logits, at(1), state)
    assert routed.chosen_TK.tolist() == [[2, 3]]
    assert routed.gate_TK.tolist() == [[0.25, 0.25]]


def test_a_bias_without_a_rate_stays_and_chooses() -> None:
    config = tiny(moe__selection_bias=True)
    batch, weights = global_batch(config), initial_values(config)
    bias = {i: torch.tensor([0.0, 0, 9, 9]) for i in (0, 1)}
    biased, plain = one_step(config, weights, batch, bias), one_step(config, weights, batch)
    assert biased.counts[0].tolist() == [0, 0, 20, 20]
    assert plain.counts[0].tolist() != biased.counts[0].tolist()
    assert torch.equal(biased.bias[1], bias[1])


def test_capacity_by_hand() -> None:
    """Three tokens want expert 0 first; two copies fit. By score the weakest goes, by position the last."""
    logits = torch.tensor([[1.0, 0, -5, -5], [3, 0, -5, -5], [2, 0, -5, -5], [0, 9, -5, -5]], dtype=torch.float64)
    kept = {}
    for by in ("score", "position"):
        config = tiny(moe__top_k=1, moe__capacity_factor=2.0, moe__drop_by=by)
        kept[by] = routing.route(config, logits, at(4), none()).kept_TK.flatten().tolist()
    assert kept == {"score": [False, True, True, True], "position": [True, True, False, True]}


def test_capacity_by_position_takes_first_choices_before_second_ones() -> None:
    logits = torch.tensor([[1.0, 2, -5, -5], [2, 1, -5, -5]], dtype=torch.float64)
    config = tiny(moe__capacity_factor=1.0, moe__drop_by="position")
    assert routing.route(config, logits, at(2), none()).kept_TK.tolist() == [[True, False], [True, False]]


def test_expert_choice_by_hand() -> None:
    """Each expert takes K T / E = 2 of the 4 tokens; a token may be taken by none or by several."""
    logits = torch.tensor([[5.0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0], [-9, 0, 0, 0]], dtype=torch.float64)
    routed = routing.route(tiny(moe__router="expert_choice"), logits, at(4), none())
    assert routed.chosen_TK.tolist() == [[0, -1, -1], [0, -1, -1], [1, 2, 3], [1, 2, 3]]
    assert routed.sums["differs_from_top_k"] == 4


def test_expert_groups_by_hand() -> None:
    """Experts 2 and 3 together beat experts 0 and 1, though expert 0 is the best of all."""
    logits = torch.tensor([[0.4, 0.0, 0.3, 0.3]], dtype=torch.float64).log()
    config = tiny(moe__expert_groups=2, moe__expert_groups_kept=1)
    assert routing.route(config, logits.clamp(min=-30), at(1), none()).chosen_TK.tolist() == [[2, 3]]


def test_churn_is_the_share_of_copies_that_move() -> None:
    assert none().churn([4, 4, 0, 0]) == 0.0
    assert Balance(torch.zeros(4), [2, 2, 0, 0]).churn([4, 4, 0, 0]) == 0.0
    assert Balance(torch.zeros(4), [4, 0, 0, 0]).churn([2, 2, 4, 0]) == 0.75


def test_noise_is_splitmix64() -> None:
    """The reference's first two outputs for the seed 1234567."""
    for stream, output in enumerate((6457827717110365317, 3203168211198807973)):
        assert routing.random(1234567, stream) == ((output >> 12) + 0.5) / 2**52


def test_steps_go_on_from_one_another() -> None:
    config = tiny(moe__bias_rate=0.1, moe__jitter=0.1)
    batches = [global_batch(config, step) for step in (1, 2)]
    assert [list(m.numbers or ()) for batch in batches for m in batch] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    first, second = steps(config, initial_values(config), batches)
    assert first.means[0]["churn"] == 0
    assert second.means[0]["churn"] > 0
    alone = one_step(config, first.parameters, batches[1])
    assert alone.loss != second.loss, "the bias of the first step changes choices in the second"
