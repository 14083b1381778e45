"""Batches read beside training: a thread and a bounded queue."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

from moe_dtensor.data.loader import Batch, Loader

DEPTH = 4  # batches that wait at most


@dataclass(frozen=True)
class Ready:
    """A batch, and where the loader stood after it."""

    batch: Batch
    state: dict[str, str]
    tokens_by_source: dict[str, int]


class Prefetcher:
    """This rank's share of a loader's batches, read ahead of their use. Its position is that of what was taken.

    Args:
        loader: read by the thread alone from now on.
        dp_rank: which share of each global batch.
        dp: of how many.
        depth: batches that wait at most.
    """

    def __init__(self, loader: Loader, dp_rank: int, dp: int, depth: int = DEPTH) -> None:
        self.loader, self.dp_rank, self.dp, self.depth = loader, dp_rank, dp, depth
        self._state = loader.state_dict()
        self._thread: threading.Thread | None = None
        self.wait_seconds = 0.0
        """What the latest :meth:`next` waited."""
        self.tokens_by_source: dict[str, int] = loader.tokens_by_source()

    def next(self) -> Batch:
        """The next batch; what the reading raised is raised here."""
        if self._thread is None:
            self._start()
        start = time.perf_counter()
        ready = self._queue.get()
        self.wait_seconds = time.perf_counter() - start
        if isinstance(ready, BaseException):
            self.close()
            raise ready
        self._state, self.tokens_by_source = ready.state, ready.tokens_by_source
        return ready.batch

    def state_dict(self) -> dict[str, str]:
        """The position after the batch taken last, as the loader's."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.close()
        self.loader.load_state_dict(state)
        self._state, self.tokens_by_source = self.loader.state_dict(), self.loader.tokens_by_source()

    def close(self) -> None:
        """End the thread; what it had read ahead is dropped, so load a state before going on."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():
            try:  # it may wait for room
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()
        self._thread = None

    def _start(self) -> None:
        self._queue: queue.Queue[Ready | BaseException] = queue.Queue(self.depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(self._queue, self._stop), daemon=True)
        self._thread.start()

    def _read(self, ready: queue.Queue[Ready | BaseException], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                share = self.loader.batch_size // self.dp
                batch = self.loader.next_batch(self.dp_rank * share, (self.dp_rank + 1) * share)
                ready.put(Ready(batch, self.loader.state_dict(), self.loader.tokens_by_source()))
        except BaseException as error:  # told to whoever takes the next batch
            ready.put(error)
