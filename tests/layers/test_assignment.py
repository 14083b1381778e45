"""How experts are chosen: forced routers, expert choice, ties."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.layers.assignment import round_to_ties
from moe_dtensor.layers.tokens import build_tokens, uniform_noise

from .routers import EXPERTS, LENGTH, SEQUENCES, build_router, load, route, route_tokens, tokens, vectors


def many(router: str, **keys: object) -> torch.Tensor:
    """Choices ``(64, 256, K)`` of many tokens."""
    x = torch.zeros(64, 256, 16, dtype=torch.float64)
    return route(build_router(router=router, **keys), x).expert_BSK


def test_uniform_is_uniform() -> None:
    """Chi-squared with 7 degrees of freedom: above 24.3 once in a thousand; the draw is the same every time."""
    for top_k in (1, 2):
        counts = load(many("uniform", top_k=top_k)).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 24.3
    first, second = many("uniform", top_k=2).unbind(-1)
    together = torch.bincount((first * EXPERTS + second).flatten(), minlength=EXPERTS**2)
    assert (together.view(EXPERTS, EXPERTS).diagonal() == 0).all()
    assert (together > 0).sum() == EXPERTS * (EXPERTS - 1)


def test_zipf_falls_as_one_over_rank() -> None:
    counts = load(many("zipf", top_k=1)).double()
    share = torch.arange(1, EXPERTS + 1).double().reciprocal()
    expected = share / share.sum() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
    two = load(many("zipf", top_k=2))
    assert two.argmax() == 0
    assert torch.equal(two.sort(descending=True).indices, torch.arange(EXPERTS))


def test_hash_sends_the_same_id_to_the_same_experts() -> None:
    expert, ids = route(build_router(router="hash")).expert_BSK, tokens().id_BS
    by_id: dict[int, set[tuple[int, ...]]] = {}
    for i, row in zip(ids.flatten().tolist(), expert.flatten(0, 1).tolist(), strict=True):
        by_id.setdefault(i, set()).add(tuple(row))
    assert all(len(rows) == 1 for rows in by_id.values())
    assert len(set.union(*by_id.values())) > 20
    in_another_run = route(build_router(router="hash", training__seed=7)).expert_BSK
    in_another_layer = route(build_router(router="hash", layer=1)).expert_BSK
    assert torch.equal(expert, in_another_run)
    assert not torch.equal(expert, in_another_layer)


@pytest.mark.parametrize("router", ["uniform", "zipf"])
def test_chance_is_another_in_each_layer_run_and_step(router: str) -> None:
    expert = many(router)
    assert torch.equal(expert, many(router))
    assert not torch.equal(expert, many(router, layer=1))
    assert not torch.equal(expert, many(router, training__seed=1))
    module, x = build_router(router=router), vectors()
    later = build_tokens(tokens().id_BS, torch.arange(SEQUENCES) + SEQUENCES)
    assert not torch.equal(route(module, x).expert_BSK, route_tokens(module, x, later).expert_BSK)


def test_noise_is_splitmix64() -> None:
    """The reference's first outputs for the seed 1234567, and nothing that rounds to 0 or 1."""
    outputs = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    for stream, output in enumerate(outputs):
        assert uniform_noise(torch.tensor(1234567), stream).item() == ((output >> 12) + 0.5) / 2**52
    noise = uniform_noise(torch.arange(100_000), 5)
    assert 0 < noise.min() < noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(("top_k", "group"), [(1, 1), (2, 4), (3, 2)])
def test_expert_choice_gives_every_expert_its_share_of_each_group(top_k: int, group: int) -> None:
    """And of the tokens those that score highest for it."""
    router, x = build_router(router="expert_choice", top_k=top_k, group_sequences=group), vectors()
    gate, expert, _ = route(router, x)
    scores = (x @ router.weight.T).softmax(-1)
    each = group * LENGTH * top_k // EXPERTS
    for start in range(0, SEQUENCES, group):
        held = slice(start, start + group)
        assert load(expert[held]).tolist() == [each] * EXPERTS
        for e in range(EXPERTS):
            taken = (expert[held] == e).any(-1)
            assert scores[held][..., e][taken].min() > scores[held][..., e][~taken].max()
    torch.testing.assert_close(gate, torch.where(expert >= 0, scores.gather(-1, expert.clamp(min=0)), 0.0))


def test_expert_choice_takes_the_earlier_of_equal_tokens() -> None:
    router = build_router(router="expert_choice", training__seq_len=8)
    expert = route(router, torch.ones(4, 8, 16, dtype=torch.float64)).expert_BSK
    assert (expert[:1] >= 0).all()
    assert (expert[1:] == -1).all()


def test_equal_scores_stay_equal_whatever_the_last_bit() -> None:
    """Tokens all alike share every expert equally; meshes that sum in another order must still agree."""
    scores = torch.zeros(1, 5, 8, dtype=torch.float64) - 2.0794415416798357
    assert torch.equal(round_to_ties(scores + torch.randn_like(scores) * 1e-15), round_to_ties(scores))


def test_scores_that_differ_keep_their_order() -> None:
    scores = torch.randn(2, 50, 16, dtype=torch.float64)
    assert torch.equal(round_to_ties(scores).topk(4).indices, scores.topk(4).indices)
