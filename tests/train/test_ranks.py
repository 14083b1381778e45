"""What ranks agree on, in worlds of which each is a thread here."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from moe_dtensor.config.errors import WRONG, ConfigError, RunError
from moe_dtensor.train.ranks import MOST, Ended, Ranks, within


class CountedStore:
    """A store that counts requests by rank."""

    def __init__(self) -> None:
        self._store, self._lock = dist.HashStore(), threading.Lock()
        self.requests: Counter[int] = Counter()

    def of(self, rank: int) -> _OfRank:
        return _OfRank(self, rank)

    def ask(self, rank: int, what: str, *words: object) -> object:
        with self._lock:
            self.requests[rank] += 1
            return getattr(self._store, what)(*words)


class _OfRank:
    def __init__(self, store: CountedStore, rank: int) -> None:
        self._store, self._rank = store, rank

    def __getattr__(self, what: str) -> object:
        return lambda *words: self._store.ask(self._rank, what, *words)


def world(size: int, store: CountedStore, lost_after: float = 60.0) -> list[Ranks]:
    ranks = []
    for rank in range(size):
        one = object.__new__(Ranks)
        one.rank, one.world_size, one.host, one._round, one.store = rank, size, "here", 0, store.of(rank)
        one.lost_after = lost_after
        ranks.append(one)
    return ranks


def outcomes(ranks: list[Ranks], failing: dict[int, str]) -> list[object]:
    """Of each rank that agrees what it gets, or raises; those in ``failing`` fail so."""

    def work(rank: int) -> int:
        if rank in failing:
            raise ConfigError(failing[rank], "Mend it.")
        return rank

    def agree(one: Ranks) -> object:
        try:
            return one.agree(lambda: work(one.rank))
        except (Ended, RunError) as end:
            return end

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(agree, ranks))


def test_each_rank_goes_on_once_all_have_come() -> None:
    store = CountedStore()
    ranks = world(256, store)
    assert outcomes(ranks, {}) == list(range(256))
    quiet = [store.requests[one.rank] for one in ranks if not one.looks_around]
    assert len(quiet) == 256 - MOST
    # None but some asks for every other rank: a few requests, and one or two each time that it looks.
    assert max(quiet) < 100


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ({3: "no file."}, {3: "rank 3 on here: no file.\nMend it."}),
        (
            {2: "one.", 5: "other.", 7: "one."},
            {2: "rank 2 on here: one.\nMend it.", 5: "rank 5 on here: other.\nMend it."},
        ),
        (dict.fromkeys(range(8), "all."), {0: "all.\nMend it."}),
    ],
)
def test_an_error_is_told_once_and_ends_all(failing: dict[int, str], told: dict[int, str]) -> None:
    ends = outcomes(world(8, CountedStore()), failing)
    assert all(isinstance(end, Ended) and end.status == WRONG for end in ends)
    found = {rank: end.message for rank, end in enumerate(ends) if isinstance(end, Ended) and end.message}
    assert {rank: message.removeprefix("error: ").replace("\n       ", "\n") for rank, message in found.items()} == told


def test_a_rank_that_never_comes_is_named_on_all_in_a_large_world() -> None:
    ends = outcomes([one for one in world(2 * MOST, CountedStore(), 0.5) if one.rank != 5], {})
    assert {str(end) for end in ends if isinstance(end, RunError)} == {
        "rank 5 gives no sign of life for 0 s, before the first step."
    }
    assert len(ends) == 2 * MOST - 1


def test_a_store_that_never_answers_is_left() -> None:
    begin = time.monotonic()
    assert within(0.2, lambda: threading.Event().wait(30)) is None
    assert time.monotonic() - begin < 10
    assert within(10, lambda: 3) == 3
    with pytest.raises(RuntimeError, match="gone"):
        within(10, lambda: (_ for _ in ()).throw(RuntimeError("gone")))
