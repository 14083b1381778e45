"""A rank that hears nothing ends; one that was frozen has not heard nothing."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_dtensor.config.errors import FAILED, PEER_LOST
from moe_dtensor.train.watch import Watch


class Clock:
    """Each wait takes its period, or what is listed for it; the last one says stop."""

    def __init__(self, waits: list[float | None]) -> None:
        self.waits, self.now = waits, 100.0

    def wait(self, period: float) -> bool:
        if not self.waits:
            return True
        self.now += self.waits.pop(0) or period
        return False


@pytest.mark.parametrize(
    ("waits", "ends"),
    [([None] * 400, True), ([None] * 10, False), ([None, 5000.0, *[None] * 10], False)],
    ids=["silence", "a moment", "frozen"],
)
def test_what_counts_as_silence(
    waits: list[float | None], ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ended = Clock(waits), []
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    watch = Watch(SimpleNamespace(world_size=1, rank=1, host="here"), 60.0, ended.append)
    watch.arm(tmp_path)
    watch._stop = clock  # type: ignore[assignment]
    watch._guard()
    assert bool(ended) == ends
    assert set(ended) <= {FAILED}


class Store:
    """A store on this process, which may be gone."""

    def __init__(self, gone: bool) -> None:
        self.gone, self.counts = gone, dict[str, int]()

    def add(self, key: str, more: int) -> int:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self.counts[key] = self.counts.get(key, 0) + more
        return self.counts[key]

    def check(self, keys: list[str]) -> bool:
        return self.add(keys[0], 0) > 0


@pytest.mark.parametrize("gone", [False, True], ids=["store", "no store"])
@pytest.mark.parametrize(("rank", "status"), [(0, FAILED), (2, PEER_LOST)])
def test_whoever_finds_a_rank_that_hangs_ends(
    rank: int, status: int, gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store that went with its host a rank looked again and again."""
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    ended: list[int] = []
    watch = Watch(SimpleNamespace(world_size=1, rank=rank, host="here"), 0.5, ended.append)
    watch._period, watch._store = 0.05, Store(gone)  # type: ignore[assignment]
    watch.arm(tmp_path)
    signs = {r: {"step": 3, "host": "here", "at": "somewhere", "age": 0.0, "waits": r != 1} for r in range(3)}
    watch._look(signs)
    assert ended == [status]
    assert [path.name for path in tmp_path.iterdir()] == [f"step-0-rank-{rank}.json"]
