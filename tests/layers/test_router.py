"""Routing: gates, groups, evaluation, diagnostics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dtensor.config.schema import Config
from moe_dtensor.layers.assignment import Assignment
from moe_dtensor.layers.router import RoutingRecord, unpack_record
from moe_dtensor.layers.tokens import Tokens

from .routers import EXPERTS, LENGTH, SEQUENCES, build_router, load, route, route_tokens, tokens, vectors

TOKENS = SEQUENCES * LENGTH


def test_sinkhorn_balances_what_top_k_does_not() -> None:
    balanced, plain = (load(route(build_router(router=name)).expert_BSK) for name in ("sinkhorn", "topk"))
    assert plain.max() > 2.0 * plain.double().mean()
    assert balanced.max() < 1.5 * balanced.double().mean()
    assert balanced.sum() == plain.sum() == TOKENS * 2


@pytest.mark.parametrize("router", ["sinkhorn", "topk", "hash", "uniform", "zipf"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_token_goes_to_k_different_experts(router: str, top_k: int) -> None:
    routing = route(build_router(router=router, top_k=top_k))
    assert load(routing.expert_BSK).sum() == TOKENS * top_k
    assert all(len(set(row)) == top_k for row in routing.expert_BSK.flatten(0, 1).tolist())
    assert torch.equal(routing.record_R[:EXPERTS], load(routing.expert_BSK).double())


def test_a_group_does_not_see_the_next() -> None:
    """With a group of one sequence, changing a sequence leaves the others' experts as they were."""
    router = build_router(group_sequences=1)
    x = vectors()
    changed = x.clone()
    changed[2] = -changed[2]
    before, after = route(router, x).expert_BSK, route(router, changed).expert_BSK
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    ("router", "top_k", "score"), [("sinkhorn", 1, "sigmoid"), ("sinkhorn", 2, "softmax"), ("topk", 1, "softmax")]
)
def test_gates_are_the_scores_of_the_chosen(router: str, top_k: int, score: str) -> None:
    module = build_router(router=router, top_k=top_k)
    x = vectors()
    gate, expert, _ = route(module, x)
    logits = x @ module.weight.T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(gate, scores.gather(-1, expert))
    gate.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "keys", [{"normalize_gates": True}, {"score": "sigmoid", "normalize_gates": True}, {"score_before_top_k": False}]
)
def test_gates_that_sum_to_one(keys: dict[str, object]) -> None:
    gate = route(build_router(router="topk", gate_scale=2.5, **keys)).gate_BSK
    torch.testing.assert_close(gate.sum(-1), torch.full((SEQUENCES, LENGTH), 2.5, dtype=torch.float64))


def test_tokens_all_alike_go_to_the_lowest_experts() -> None:
    expert = route(build_router(), torch.ones(4, 8, 16, dtype=torch.float64)).expert_BSK
    assert torch.equal(expert, torch.tensor([0, 1]).expand(4, 8, 2))


EVALUATED = [
    {"router": "sinkhorn"},
    {"router": "expert_choice"},
    {"router": "topk", "capacity_factor": 0.5, "jitter": 0.5, "balance_loss": 1.0, "z_loss": 1.0},
]


@pytest.mark.parametrize("keys", EVALUATED, ids=lambda keys: keys["router"])
def test_evaluation_is_plain_top_k_without_noise_losses_or_drops(keys: dict[str, object]) -> None:
    router, x = build_router(**keys).eval(), vectors()
    gate, expert, _ = route(router, x)
    logits = x @ router.weight.T
    assert torch.equal(expert, logits.topk(2, dim=-1).indices)
    gate.sum().backward()
    found, router.weight.grad = router.weight.grad, None
    logits.softmax(-1).gather(-1, expert).sum().backward()
    torch.testing.assert_close(found, router.weight.grad)


@pytest.mark.parametrize("router", ["hash", "uniform", "zipf"])
def test_forced_routers_are_the_same_in_evaluation(router: str) -> None:
    module = build_router(router=router)
    assert torch.equal(route(module).expert_BSK, route(module.eval()).expert_BSK)


def test_bias_and_expert_groups_hold_in_evaluation() -> None:
    router = build_router(bias_rate=0.1, expert_groups=4, expert_groups_kept=1).eval()
    router.bias = torch.zeros(EXPERTS)
    router.bias[6:] = 10.0
    assert load(route(router).expert_BSK).tolist() == [0] * 6 + [TOKENS, TOKENS]


@pytest.mark.parametrize("router", ["topk", "sinkhorn"])
@pytest.mark.parametrize("before", [True, False])
def test_a_bias_without_a_rate_moves_the_choice_and_no_gate(router: str, before: bool) -> None:
    keys = {"router": router, "score_before_top_k": before}
    biased, plain = build_router(**keys, selection_bias=True), build_router(**keys)
    for module in (biased, biased.eval()):
        module.bias = torch.zeros(EXPERTS)
        module.bias[6:] = 100.0
        routing = route(module)
        assert load(routing.expert_BSK).tolist() == [0] * 6 + [TOKENS, TOKENS]
        logits = torch.nn.functional.linear(vectors(), module.weight)
        scores = logits.softmax(-1).gather(-1, routing.expert_BSK)
        expected = scores if before else scores / scores.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.gate_BSK, expected)
    plain.bias = biased.bias
    assert load(route(plain).expert_BSK)[0] > 0, "without the key nobody looks at it"


def test_jitter_changes_the_choice_but_not_what_experts_see() -> None:
    """It is drawn by the number of a token in the run: the same each time, another one in another step."""
    router, x = build_router(router="topk", jitter=0.3), vectors()
    plain = route(build_router(router="topk"), x)
    first = route(router, x)
    assert torch.equal(first.expert_BSK, route(router, x).expert_BSK)
    assert not torch.equal(first.expert_BSK, plain.expert_BSK)
    later = tokens()._replace(number_BS=tokens().number_BS + TOKENS)
    assert not torch.equal(first.expert_BSK, route_tokens(router, x, later).expert_BSK)
    noise = router._noise(tokens(), x.shape[2])
    assert 0.7 < noise.min() < 0.71 < 1.29 < noise.max() < 1.3
    assert noise.mean().item() == pytest.approx(1.0, abs=0.01)


def record_of(**keys: object) -> RoutingRecord:
    return unpack_record(route(build_router(**keys)).record_R[None], TOKENS, 2)


def test_diagnostics() -> None:
    plain, balanced = record_of(router="topk", balance_loss=0.01), record_of(router="sinkhorn")
    assert plain.load_LE.sum() == TOKENS * 2
    assert 0 < plain.mean_L["router_entropy"].item() < torch.tensor(EXPERTS).log().item()
    assert 0 < plain.mean_L["router_margin"].item() < 1
    assert 1.2 < plain.mean_L["balance_loss"].item() < EXPERTS
    for name in ("dropped", "differs_from_top_k", "sinkhorn_error"):
        assert plain.mean_L[name].item() == 0
    assert balanced.mean_L["balance_loss"].item() == 0
    assert balanced.mean_L["differs_from_top_k"].item() > 0.2
    assert 0 < balanced.mean_L["sinkhorn_error"].item() < 0.2
    more = record_of(router="sinkhorn", sinkhorn_iterations=100)
    assert more.mean_L["sinkhorn_error"] < balanced.mean_L["sinkhorn_error"] / 10


def test_sinkhorn_error_does_not_depend_on_how_the_matrix_is_handed_on() -> None:
    """Under a bias the choice goes by Sinkhorn's matrix, without one by its logarithm."""
    log, matrix = record_of(router="sinkhorn"), record_of(router="sinkhorn", bias_rate=0.1)
    torch.testing.assert_close(log.mean_L["sinkhorn_error"], matrix.mean_L["sinkhorn_error"])
    assert torch.equal(log.load_LE, matrix.load_LE)


def test_a_router_of_ones_own() -> None:
    """``moe.router`` takes package.module:Name; see docs/own_parts.md."""
    router = build_router(router=f"{__name__}:Lazy", layer=3)
    assert load(route(router).expert_BSK).tolist() == [0, 0, 0, TOKENS, TOKENS, 0, 0, 0]
    record = unpack_record(route(router).record_R[None], TOKENS, 2)
    assert record.mean_L["differs_from_top_k"].item() > 0.2
    plain = route(build_router(router="topk").eval()).expert_BSK
    assert torch.equal(route(router.eval()).expert_BSK, plain)


def test_the_router_of_the_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of docs/own_parts.md, as it stands."""
    text = (Path(__file__).parents[2] / "docs" / "own_parts.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_noisy_parts.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    router = build_router(router="my_noisy_parts:Noisy")
    first, again = (route(router).expert_BSK for _ in range(2))
    assert torch.equal(first, again)
    plain = route(router.eval()).expert_BSK
    assert 0 < (first != plain).any(-1).double().mean() < 0.5


class Lazy(Assignment):
    """Sends every token to the expert of its layer's number and the one after."""

    def __init__(self, config: Config, layer: int) -> None:
        self.first = layer

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        assert tokens_GT.id_BS.shape == logits_GTE.shape[:2]
        ids_E = torch.arange(logits_GTE.shape[-1])
        return -((ids_E - self.first) % len(ids_E)).expand_as(logits_GTE).double()


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_a_router_of_ones_own_over_groups_with_any_number_of_experts(capacity: float) -> None:
    router = build_router(router=f"{__name__}:Greedy", group_sequences=2, capacity_factor=capacity)
    taken = load(route(router).expert_BSK)
    assert taken.tolist() == [2 * 32 if capacity else TOKENS, *[0] * (EXPERTS - 2), 2 * 32]


class Greedy(Assignment):
    """Sends all tokens to expert 0, and of a group the 32 that like it best to the last expert too."""

    over_groups = True
    variable = True

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        assert logits_GTE.shape[:2] == (2, 2 * LENGTH) == tokens_GT.number_BS.shape
        ranking = torch.full_like(logits_GTE, -torch.inf)
        ranking[..., 0] = 2.0
        best = logits_GTE[..., -1].topk(32, dim=1).indices
        ranking[..., -1].scatter_(1, best, 1.0)
        return ranking
