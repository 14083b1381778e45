"""Experts taken out, merged and added: the same function where it should be, the optimizer's rows with them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moe_dtensor.checkpoint import surgery
from moe_dtensor.checkpoint.surgery import Cut
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import moe_layers, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer

EXPERTS = 6
MIXTURE = resolve(
    override(
        Config(),
        {
            "model.num_layers": 3,
            "model.dim": 24,
            "model.num_heads": 2,
            "model.vocab_size": 61,
            "moe.num_experts": EXPERTS,
            "moe.layers": (0, 2),
            "moe.hidden_dim": 16,
            "moe.router": "topk",
            "training.seq_len": 12,
        },
    ),
    1,
)
TOKENS = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(0))


def mixture(config: Config) -> tuple[Transformer, BalanceState]:
    model = Transformer(config, range(config.model.num_layers)).double().eval()
    init_weights(model, override(config, {"model.init_std": 0.2}))
    return model, BalanceState(config, [model], torch.device("cpu"))


def cut_model(config: Config, cuts: Mapping[int, Cut], biases: Tensor | None = None) -> tuple[float, Transformer]:
    """How far the cut model's logits are from those before, and the cut model."""
    before, balance = mixture(config)
    if biases is not None:
        balance.bias_LE.copy_(biases)
    after_config = surgery.cut_config(config, cuts)
    after, its_balance = mixture(after_config)
    values = before.state_dict()
    after.load_state_dict({name: surgery.cut_parameter(name, value, cuts) for name, value in values.items()})
    its_balance.load_state_dict(surgery.cut_balance(config, balance.state_dict(), cuts))
    with torch.no_grad():
        old, new = before(TOKENS), after(TOKENS)
    return float((new - old).abs().max() / old.abs().max()), after


GATES = [
    {"moe.normalize_gates": True},
    {"moe.score_before_top_k": False},
    {"moe.score": "sigmoid"},
    {"moe.score": "sigmoid", "moe.normalize_gates": True},
]


@pytest.mark.parametrize("gates", GATES, ids=str)
def test_an_expert_that_nobody_chooses_is_not_missed(gates: dict[str, object]) -> None:
    config = override(MIXTURE, {"moe.selection_bias": True, **gates})
    biases = torch.zeros(2, EXPERTS)
    biases[0, 1] = biases[0, 4] = biases[1, 0] = biases[1, 5] = -1e6
    cuts = {0: surgery.prune(EXPERTS, [1, 4]), 2: surgery.prune(EXPERTS, [0, 5])}
    error, after = cut_model(config, cuts, biases)
    assert error < 1e-14
    assert after.state_dict()["layers.0.moe.experts.w_up"].shape[0] == 4
    wrong, _ = cut_model(config, {0: surgery.prune(EXPERTS, [0, 4]), 2: cuts[2]}, biases)
    assert wrong > 1e-3, "an expert that is chosen is missed"


@pytest.mark.parametrize("gates", [{}, *GATES], ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_copies_of_all_experts_change_nothing(gates: dict[str, object], times: int) -> None:
    config = override(MIXTURE, {"moe.selection_bias": True, **gates})
    cuts = {i: surgery.add(torch.ones(EXPERTS), times * EXPERTS) for i in moe_layers(config)}
    biases = torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(0)) / 8
    error, after = cut_model(config, cuts, biases)
    assert error < 1e-13
    assert surgery.cut_config(config, cuts).moe.top_k == 2 * (1 + times)
    assert after.state_dict()["layers.2.moe.router.weight"].shape[0] == EXPERTS * (1 + times)


def test_copies_merged_again_are_what_was() -> None:
    load = torch.tensor([5.0, 1, 7, 2, 0, 3])
    added = {i: surgery.add(load, EXPERTS) for i in (0, 2)}
    before, _ = mixture(MIXTURE)
    for name, value in before.state_dict().items():
        more = surgery.cut_parameter(name, value, added)
        pairs = [(2 * e, 2 * e + 1) for e in range(EXPERTS)]
        merged = {i: surgery.merge_groups(torch.rand(2 * EXPERTS), pairs) for i in (0, 2)}
        torch.testing.assert_close(surgery.cut_parameter(name, more, merged), value, rtol=1e-14, atol=1e-14)


def test_what_is_merged_with_what() -> None:
    """The most loaded stay; the others join whose router row is most like theirs; a group is its mean by load."""
    router = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9]])
    cut = surgery.merge(router, torch.tensor([6.0, 4, 2, 0]), 2)
    assert cut.sources == ((0, 2), (1, 3))
    assert cut.weights == ((0.75, 0.25), (1.0, 0.0))
    weight = torch.arange(8.0).view(4, 2)
    made = surgery.cut_parameter("layers.0.moe.router.weight", weight, {0: cut})
    assert made.tolist() == [[1.0, 2.0], [2.0, 3.0]]


def test_noise_tells_copies_from_their_originals() -> None:
    cut = surgery.add(torch.tensor([0.0, 9, 1]), 2)
    assert cut.sources == ((0,), (1,), (2,), (1,), (2,))
    value = torch.randn(3, 50, 4)
    made = surgery.cut_parameter("layers.0.moe.experts.w_down", value, {0: cut}, noise=0.1)
    assert torch.equal(made[:3], value)
    added = (made[3:] - value[[1, 2]]).std() / value.std()
    assert float(added) == pytest.approx(0.1, rel=0.2)


def test_the_optimizers_rows_go_with_their_experts() -> None:
    value = torch.arange(1.0, 7).view(6, 1)
    name = "state.layers.0.moe.experts.w_up.exp_avg"
    assert surgery.cut_state(name, value, {0: surgery.prune(6, [0, 3])}).flatten().tolist() == [2, 3, 5, 6]
    merged = surgery.merge_groups(torch.ones(6), [(0, 1), (2,), (3, 4), (5,)])
    assert surgery.cut_state(name, value, {0: merged}).flatten().tolist() == [0, 3, 0, 6]
    doubled = surgery.add(torch.ones(6), 6)
    assert surgery.cut_state(name, value, {0: doubled}).flatten().tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]
    for other in ("state.layers.0.moe.experts.w_up.step", "state.norm.weight.exp_avg", "param_groups.norm.weight.lr"):
        assert surgery.cut_state(other, value, {0: doubled}) is value


def test_biases_and_loads_go_with_their_experts() -> None:
    balance = {"bias": torch.tensor([[0.1, 0.2, 0.3]]), "previous_load": torch.tensor([[4.0, 1, 3]])}
    merged = surgery.cut_balance(MIXTURE, balance, {1: surgery.merge_groups(torch.tensor([4.0, 1, 3]), [(0, 2), (1,)])})
    assert merged["previous_load"].tolist() == [[7, 1]]
    assert merged["bias"].tolist() == [[pytest.approx((4 * 0.1 + 3 * 0.3) / 7), pytest.approx(0.2)]]
    added = surgery.cut_balance(MIXTURE, balance, {1: surgery.add(torch.tensor([4.0, 1, 3]), 1)})
    assert added["bias"].tolist() == [[*balance["bias"][0].tolist(), pytest.approx(0.1)]]
    assert added["previous_load"].tolist() == [[4, 1, 3, 0]]


def test_the_least_loaded() -> None:
    assert surgery.least_loaded(torch.tensor([3.0, 0, 1, 0]), 2) == [1, 3]
    assert surgery.least_loaded(torch.tensor([1.0, 1, 1, 1]), 2) == [2, 3]


@pytest.mark.parametrize(
    ("config", "cuts", "rule"),
    [
        (MIXTURE, {0: surgery.prune(6, [1])}, r"the MoE blocks are \[0, 2\]"),
        (MIXTURE, {0: surgery.prune(6, [1]), 2: surgery.prune(6, [1, 2])}, r"would have \[4, 5\] experts"),
        (MIXTURE, {0: surgery.keep([0, 9]), 2: surgery.keep([0, 1])}, "no expert 9"),
        (MIXTURE, {0: surgery.keep([0]), 2: surgery.keep([1])}, "fewer than moe.top_k = 2"),
        (override(MIXTURE, {"moe.expert_groups": 2}), {i: surgery.keep([0, 1]) for i in (0, 2)}, "other groups"),
        (override(MIXTURE, {"moe.num_experts": 0}), {0: surgery.keep([0])}, "dense"),
    ],
)
def test_refused(config: Config, cuts: dict[int, Cut], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        surgery.cut_config(config, cuts)
