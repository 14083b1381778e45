"""Router and sort through Triton kernels."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.kernels.experts import sort_triton
from moe_dtensor.kernels.experts.sort import sort_by_expert
from moe_dtensor.kernels.router import top_k_gates
from moe_dtensor.kernels.router_triton import split_halves
from tests.kernels.router_cases import CASES, check_gates, check_tiny_scores


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize(("T", "E", "K", "score", "normalize"), CASES)
def test_gates_and_choice(T, E, K, score, normalize, ranked, device, poisoned_memory):
    check_gates(T, E, K, score, normalize, ranked, device)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_normalised_gates_of_tiny_scores(score, device):
    check_tiny_scores(score, device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_choices_are_distinct_ids_whatever_the_logits(device):
    for value in (float("nan"), -float("inf"), 0.0):
        _, expert_TK = top_k_gates(torch.full((3, 6), value, device=device), 4)
        assert expert_TK.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("first", "held"), [(0, 7), (2, 3), (6, 1)])
@pytest.mark.parametrize(("T", "max_chunks"), [(1, 128), (300, 128), (300, 2), (300, 3)])
def test_counting_sort_is_the_stable_sort(T, max_chunks, first, held, device, monkeypatch, poisoned_memory):
    monkeypatch.setattr(sort_triton, "_MAX_CHUNKS", max_chunks)
    monkeypatch.setattr(sort_triton, "_ELEMENTS", 32)
    torch.manual_seed(0)
    expert_TK = torch.rand(T, 7).topk(3, 1).indices
    expert_TK[::4, 1] = -1
    by_triton = [t.cpu() for t in sort_by_expert(expert_TK.to(device), first, held)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    position, copy, ends = sort_by_expert(expert_TK, first, held)
    rows = int(ends[-1])
    assert torch.equal(by_triton[0], position)
    assert torch.equal(by_triton[1][:rows], copy[:rows])
    assert torch.equal(by_triton[2], ends)


@pytest.mark.parametrize("D", [3, 500])
def test_two_halves_add_up(D, device, poisoned_memory):
    x_TE = torch.randn(37, 5, device=device)
    w_ED = torch.randn(5, D, device=device, dtype=torch.bfloat16)
    out_TC, twice_CD = split_halves(x_TE, w_ED)
    assert torch.equal(twice_CD, torch.cat([w_ED, w_ED]))
    torch.testing.assert_close(out_TC[:, :5].float(), x_TE, atol=0, rtol=2**-7)
    torch.testing.assert_close(out_TC.float().view(37, 2, 5).sum(1), x_TE, atol=0, rtol=2**-14)
