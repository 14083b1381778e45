"""Routing: balance, ties, gates, groups."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.config.build import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.router import Router, round_to_ties


def build_router(**keys: object) -> Router:
    moe = {"moe.num_experts": 8, "moe.top_k": 2, "training.microbatch_size": 4, "model.dim": 16} | {
        key.replace("__", "."): value for key, value in keys.items()
    }
    router = Router(resolve(override(Config(), moe), 1)).double()
    torch.manual_seed(1)
    torch.nn.init.normal_(router.weight)
    return router.train()


def load(expert: torch.Tensor, experts: int = 8) -> torch.Tensor:
    return torch.bincount(expert.flatten(), minlength=experts)


def test_sinkhorn_balances_what_top_k_does_not() -> None:
    x = torch.randn(4, 64, 16, dtype=torch.float64) + 2 * torch.randn(16, dtype=torch.float64)
    balanced = load(build_router()(x)[1])
    plain = load(build_router(moe__router="topk")(x)[1])
    assert plain.max() > 2.0 * plain.double().mean()
    assert balanced.max() < 1.5 * balanced.double().mean()
    assert balanced.sum() == plain.sum() == 4 * 64 * 2


def test_evaluation_is_plain_top_k() -> None:
    x = torch.randn(4, 64, 16, dtype=torch.float64)
    router = build_router().eval()
    assert torch.equal(router(x)[1], (x @ router.weight.T).topk(2, dim=-1).indices)


def test_a_group_does_not_see_the_next() -> None:
    """With a group of one sequence, changing a sequence leaves the others' experts as they were."""
    router = build_router(moe__group_sequences=1)
    x = torch.randn(4, 64, 16, dtype=torch.float64)
    changed = x.clone()
    changed[2] += 1.0
    before, after = router(x)[1], router(changed)[1]
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    ("router", "top_k", "score"), [("sinkhorn", 1, "sigmoid"), ("sinkhorn", 2, "softmax"), ("topk", 1, "softmax")]
)
def test_gates_are_the_scores_of_the_chosen(router: str, top_k: int, score: str) -> None:
    module = build_router(moe__router=router, moe__top_k=top_k)
    x = torch.randn(4, 8, 16, dtype=torch.float64)
    gate, expert = module(x)
    logits = x @ module.weight.T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(gate, scores.gather(-1, expert))
    gate.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


def test_equal_scores_stay_equal_whatever_the_last_bit() -> None:
    """Tokens all alike share every expert equally; meshes that sum in another order must still agree."""
    scores = torch.zeros(1, 5, 8, dtype=torch.float64) - 2.0794415416798357
    assert torch.equal(round_to_ties(scores + torch.randn_like(scores) * 1e-15), round_to_ties(scores))


def test_tokens_all_alike_go_to_the_lowest_experts() -> None:
    expert = build_router()(torch.ones(4, 8, 16, dtype=torch.float64))[1]
    assert torch.equal(expert, torch.tensor([0, 1]).expand(4, 8, 2))


def test_scores_that_differ_keep_their_order() -> None:
    scores = torch.randn(2, 50, 16, dtype=torch.float64)
    assert torch.equal(round_to_ties(scores).topk(4).indices, scores.topk(4).indices)


def test_a_router_of_ones_own() -> None:
    """``moe.router`` takes package.module:Name; see docs/own_parts.md."""
    router = build_router(moe__router=f"{__name__}:Lazy")
    assert load(router(torch.randn(4, 8, 16, dtype=torch.float64))[1]).tolist() == [32, 32, 0, 0, 0, 0, 0, 0]


class Lazy:
    """Sends every token to the first experts."""

    over_groups = False
    score = "softmax"

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return -torch.arange(logits.shape[-1]).expand_as(logits).double()
