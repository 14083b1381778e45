"""Whose turn it is, and which window: both for any place at once, without a table."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from moe_dtensor.data.order import Permutation, Turns, whole_weights


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_met_to_one_turn_after_every_turn(seed: int) -> None:
    generator = random.Random(seed)
    weights = [generator.choice([0, 1, 2, 3, 50, 1000, generator.randint(1, 10**5)]) for _ in range(2 + seed % 8)]
    weights[0] = 700
    turns = Turns(weights)
    for place in range(1, 2000):
        [(source, _)] = turns.take(1)
        assert weights[source] > 0
        assert sum(turns.counts) == place
        assert all(abs(c - w * place / turns.total) < 1 for c, w in zip(turns.counts, weights, strict=True))
        if place % 11 == 0:
            assert turns.counts_at(place) == turns.counts


def test_turns_are_numbered_and_go_on_from_any_place() -> None:
    turns = Turns(whole_weights([0.7, 0.2, 0.1]))
    taken = turns.take(500)
    for source in range(3):
        assert [n for s, n in taken if s == source] == list(range(turns.counts[source]))
    for place in (0, 1, 9, 10, 11, 377):
        again = Turns(whole_weights([0.7, 0.2, 0.1]))
        again.seek(place)
        assert again.take(50) == [*taken, *turns.take(50)][place : place + 50]


def test_weights_are_whole_numbers_of_their_decimals() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([3.0, 0.0, 6.0]) == [1, 0, 2]
    long = whole_weights([0.123456789012, 0.876543210988])
    assert abs(long[0] / sum(long) - 0.123456789012) < 2**-29


def test_a_place_in_a_trillion_is_found_at_once() -> None:
    turns = Turns(whole_weights([0.7, 0.2, 0.05, 0.04999, 0.00001]))
    start = time.process_time()
    turns.seek(10**12 + 12345)
    taken = time.process_time() - start
    assert taken < 0.05
    assert sum(turns.counts) == 10**12 + 12345
    assert abs(turns.counts[3] - 0.04999 * (10**12 + 12345)) < 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1000])
def test_a_permutation_visits_every_entry_once(size: int) -> None:
    orders = [Permutation(size, seed, "web", epoch)(np.arange(size)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert len({tuple(order) for order in orders}) == 4


def test_an_order_outlives_every_upgrade() -> None:
    """It was numpy's, whose streams may change with a version: a run would be reordered silently. Change no number."""
    order = Permutation(16, 7, "web", 1)(np.arange(16)).tolist()
    assert "".join(f"{entry:x}" for entry in order) == "10e78afc439d526b"
    assert Permutation(10**12, 7)(np.arange(4)).tolist() == [498714752485, 488729573822, 125428104801, 603305823404]


def test_a_permutation_looks_shuffled() -> None:
    order = Permutation(10000, 0)(np.arange(10000))
    assert abs(np.corrcoef(np.arange(10000), order)[0, 1]) < 0.05
    assert len(np.flatnonzero(np.diff(order) == 1)) < 10  # neighbours do not stay neighbours
    assert np.array_equal(Permutation(10000, 0)(np.array([7, 42])), order[[7, 42]])
    assert Permutation(10**12, 0)(np.arange(1000)).max() > 9 * 10**11
