"""A rank that hears nothing ends; one that was frozen has not heard nothing."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_dtensor.config.errors import FAILED
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
