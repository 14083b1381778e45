"""Notices a rank that hangs, and names it, its step and the operation.

Every rank writes signs of life into torchrun's store: a counter, its step, where its main thread is. A step that takes
almost as long as ``comm.timeout_seconds`` makes ranks (of 64 or more some) look at the signs of all: one that gives
none is stopped or gone; one that is not in a collective while others are waits for nothing and is waited for. A rank to
which the store itself gives no answer ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moe_dtensor.config.errors import FAILED, PEER_LOST, words
from moe_dtensor.train.ranks import STORE_SECONDS

_SHARE = 0.85
"""Of the timeout, after which a step is looked at: before the collectives themselves give up."""
_WATCHED = 0.4
"""The same, after which signs are read, so that it is known then which ones stand still."""
_WAITS_IN = ("torch/distributed/", "moe_dtensor/parallel/collectives.py", "moe_dtensor/parallel/dispatch.py")
_COMPUTES_IN = ("torch/distributed/tensor/",)


class Watch:
    """Signs of life of this rank, and a look at those of the others.

    Args:
        ranks: with the store; nothing is watched where there is one rank.
        timeout: ``comm.timeout_seconds``.
        end: ends this process with a status; ``os._exit``, but for tests.
    """

    def __init__(self, ranks: Any, timeout: float, end: Callable[[int], Any] = os._exit) -> None:
        self._ranks, self._timeout, self._end = ranks, timeout, end
        self._period = min(5.0, max(0.5, timeout / 20))
        self._main = threading.main_thread().ident
        self._step, self._what = 0, "start"
        self._since = self._answered = time.monotonic()
        self._armed = False
        self._folder: Path | None = None
        self._count = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        if ranks.world_size > 1:
            # A client of its own: another thread may block in the rank's.
            self._store = ranks.store.clone()
            threading.Thread(target=self._run, daemon=True).start()
            threading.Thread(target=self._guard, daemon=True).start()

    def arm(self, folder: Path) -> None:
        """From here on a step that stands still is looked at; what is found goes into ``folder``."""
        self._folder, self._armed = folder, True
        self.now("step", self._step)

    def now(self, what: str, step: int) -> None:
        """Note what this rank does, and that it moves."""
        self._what, self._step, self._since = what, step, time.monotonic()

    def close(self) -> None:
        """Look no more."""
        self._armed = False
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            with contextlib.suppress(RuntimeError):  # the store ends with its host
                self._give_sign()
                self._answered = time.monotonic()
                late = self._lateness()
                if late > _WATCHED * self._timeout and self._ranks.looks_around:
                    signs = self._read_signs()
                    if late > _SHARE * self._timeout:
                        self._look(signs)
                else:
                    self._seen = {}

    def _lateness(self) -> float:
        """Seconds that the step takes already; 0 where none is watched."""
        return time.monotonic() - self._since if self._armed and self._what == "step" else 0.0

    def _guard(self) -> None:
        """End where neither the step nor the store moves: the host of the store is cut off, and nobody else can end
        this rank, which may hang in the store as well."""
        limit = self._timeout + STORE_SECONDS + 2 * self._period
        looked = time.monotonic()
        while not self._stop.wait(self._period):
            now = time.monotonic()
            # One that was frozen asked for nothing either: that time does not count.
            self._answered += max(0.0, now - looked - 2 * self._period)
            looked, silent = now, now - self._answered
            if min(silent, self._lateness()) > limit:
                print(words(cut_off(self._ranks, self._step, silent)), file=sys.stderr, flush=True)
                self._end(FAILED)

    def _give_sign(self) -> None:
        self._count += 1
        frames = _frames(sys._current_frames().get(self._main or 0))
        sign = {
            "count": self._count,
            "host": self._ranks.host,
            "step": self._step,
            "what": self._what,
            "at": operation(frames),
            "waits": waits(frames),
        }
        self._store.set(f"sign/{self._ranks.rank}", json.dumps(sign))

    def _read_signs(self) -> dict[int, dict[str, Any]]:
        """The last sign of every rank, with its age in seconds."""
        signs = {}
        for rank in range(self._ranks.world_size):
            key = f"sign/{rank}"
            sign = json.loads(self._store.get(key)) if self._store.check([key]) else {"count": 0, "step": 0}
            if rank not in self._seen or self._seen[rank][0] != sign["count"]:
                self._seen[rank] = (sign["count"], time.monotonic())
            signs[rank] = {**sign, "age": time.monotonic() - self._seen[rank][1]}
        return signs

    def _look(self, signs: dict[int, dict[str, Any]]) -> None:
        hung = find_hung(signs, stale=max(3 * self._period, self._timeout / 3))
        if not hung:
            return
        healthy = [rank for rank in signs if rank not in hung]
        self._dump()
        with contextlib.suppress(RuntimeError):
            self._store.add("hang/kept", 1)
        if healthy and self._ranks.rank == healthy[0]:
            with contextlib.suppress(RuntimeError):
                self._store.add("told/lost", 1)  # ranks that lose this one need not tell it
            print(words(tale(signs, hung, healthy[0], self._folder)), file=sys.stderr, flush=True)
            # Who loses this rank first keeps no stacks.
            self._wait(lambda: self._store.add("hang/kept", 0) >= len(healthy))
            self._end(FAILED)
        else:
            self._wait(lambda: self._store.check(["told/lost"]))
            time.sleep(1.0)  # leave the one that tells the time to end
            self._end(PEER_LOST)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until it is so, or every rank that looks has had time to; not for a store that is gone."""
        end = time.monotonic() + 2 * self._period
        with contextlib.suppress(RuntimeError):
            while not done() and time.monotonic() < end:
                time.sleep(0.05)

    def _dump(self) -> None:
        """This rank's stacks, and the flight recorder's last collectives."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            stacks = {str(thread): traceback.format_stack(frame) for thread, frame in sys._current_frames().items()}
            with (self._folder / f"step-{self._step}-rank-{self._ranks.rank}.json").open("w") as file:
                json.dump({"stacks": stacks, "flight_recorder": flight_recorder()}, file, indent=1)


def cut_off(ranks: Any, step: int, silent: float) -> str:
    """What a rank tells that hears nothing."""
    return (
        f"rank {ranks.rank} on {ranks.host} hears nothing from the first host for {silent:.0f} s, and step {step} "
        "stands still.\nThat host is down, or the network between them."
    )


def find_hung(signs: dict[int, dict[str, Any]], stale: float) -> dict[int, str]:
    """The ranks that hang, with what shows it; empty where all move, or none is waited for."""
    silent = {r: f"no sign of life for {s['age']:.0f} s" for r, s in signs.items() if s["age"] > stale}
    if silent:
        return silent
    waiting = {rank for rank, sign in signs.items() if sign.get("waits")}
    if not waiting or len(waiting) == len(signs):
        return {}
    return {rank: "the others wait for it" for rank in signs if rank not in waiting}


def tale(signs: dict[int, dict[str, Any]], hung: dict[int, str], teller: int, folder: Path | None) -> str:
    """What happened, in words."""
    parts = [
        f"rank {rank} on {signs[rank].get('host', '?')} hangs in step {signs[rank]['step']}, "
        f"{signs[rank].get('at', 'at its start')} ({why})"
        for rank, why in hung.items()
    ]
    here = signs[teller]
    return (
        "; ".join(parts) + f".\nRank {teller} waits for it in step {here['step']}, {here.get('at')}. "
        f"Stacks and the last collectives of every rank that could write them: {folder}"
    )


def _frames(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """File, line and function of each call, the innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def operation(frames: list[tuple[str, int, str]]) -> str:
    """Where a thread is, in this program's own words: the innermost call, and the innermost one of this package."""
    if not frames:
        return "at its end"
    inner = frames[0]
    own = next((f for f in frames if "moe_dtensor" in f[0]), inner)
    at = f"in {own[2]} ({own[0].rpartition('moe_dtensor/')[2]}:{own[1]})"
    return at if own is inner else f"{at}, {inner[2]} ({Path(inner[0]).name}:{inner[1]})"


def waits(frames: list[tuple[str, int, str]]) -> bool:
    """Whether the innermost calls are those of a collective."""
    return any(
        any(place in file for place in _WAITS_IN) and not any(place in file for place in _COMPUTES_IN)
        for file, _, _ in frames[:4]
    )


def flight_recorder() -> Any:
    """The last collectives of this process, as torch recorded them."""
    try:
        return json.loads(torch._C._distributed_c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"not to be had: {error}"
