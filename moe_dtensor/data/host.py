"""The ranks of a run share the work of tokenising a stream: one host tokenises a chunk, and on it one rank."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_dtensor.data.other_hosts import OtherHosts, other_hosts
from moe_dtensor.data.private import make_private

KEPT = 16  # chunks of its own that a rank leaves for the others
PATIENCE = 20.0  # seconds after which a rank tokenises a chunk of another itself


class HostChunks:
    """Token arrays by key, in memory that the ranks of a host share (files under ``/dev/shm``).

    Which rank makes a chunk its key decides, so chunks are spread evenly in a known order. A chunk that does not come
    in time, or is gone, is made by who needs it: the tokens are the same.

    Args:
        rank: of this process among those of the host.
        ranks: on the host.
        name: the same for the ranks of one run on one host, and for no others; starts with their parent's process id.
        connect: to the run's other hosts, before the first chunk; None if there are none.
    """

    def __init__(
        self, rank: int, ranks: int, name: str, connect: Callable[[], OtherHosts | None] = lambda: None
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.others = functools.cache(connect)
        root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
        self.folder = root / f"moe_dtensor-{os.getuid()}-{name}" if root and ranks > 1 else None
        self.made = 0
        """Chunks that this rank tokenised."""
        self._own: deque[Path] = deque()
        if self.folder is not None and root is not None:
            for old in root.glob(f"moe_dtensor-{os.getuid()}-*"):
                if not Path("/proc", old.name.split("-")[2]).exists():  # of a run that was killed
                    shutil.rmtree(old, ignore_errors=True)
            try:
                make_private(self.folder)
            except OSError:  # of somebody else: no rank of this user shares anything there
                self.folder = None

    def get(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The chunk of a key; ``make`` tokenises it."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if self.folder is None:
            return self._make_or_find(digest, make)
        file = self.folder / f"{digest}.npy"
        if int(digest[:8], 16) % self.ranks != self.rank:
            found = self._wait(file)
            return self._make(make) if found is None else found
        tokens_N = self._make_or_find(digest, make)
        with contextlib.suppress(OSError):  # no room: the others make it themselves
            partial = file.with_suffix(f".{self.rank}")
            with partial.open("wb") as opened:
                np.save(opened, tokens_N)
            os.replace(partial, file)
            self._own.append(file)
            while len(self._own) > KEPT:
                gone = self._own.popleft()
                gone.with_suffix(".gone").touch()  # so that a rank that comes late does not wait
                gone.unlink(missing_ok=True)
        return tokens_N

    def _make_or_find(self, digest: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """As this host's one rank for a chunk: tokenise it for all hosts, or take what its host offers."""
        others = self.others()
        if others is None:
            return self._make(make)
        if others.owns(digest):
            tokens_N = self._make(make)
            others.offer(digest, tokens_N)
            return tokens_N
        found = others.find(digest)
        return self._make(make) if found is None else found

    def _make(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        self.made += 1
        return make()

    def _wait(self, file: Path) -> np.ndarray | None:
        """Another rank's chunk once it is there; None if it does not come."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                return np.load(file)
            except (OSError, ValueError):
                if file.with_suffix(".gone").exists():
                    return None
                time.sleep(0.002)
        self.folder = None  # the others do not answer: never wait again
        return None

    def close(self) -> None:
        """Take away what is shared; ranks that still look for it tokenise by themselves."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def host_chunks(name: str) -> HostChunks:
    """For this rank, by torchrun's environment; ranks of a host have one parent."""
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    stream = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    return HostChunks(rank, ranks, f"{os.getppid()}-{stream}", lambda: other_hosts(stream))
