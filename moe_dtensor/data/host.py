"""The ranks of a run share the work of tokenising a stream: one host tokenises a chunk, and on it one rank."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_dtensor.data.files import make_private

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


if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)
KEPT_BYTES = 64 << 20  # of its own chunks, for hosts that come later


class OtherHosts:
    """Chunks of token ids by key: offered by the host that tokenised them, found by the others.

    Args:
        store: that all hosts reach; its keys are this class's alone.
        host: number of this one, of ``hosts``.
    """

    def __init__(self, store: Store, host: int, hosts: int) -> None:
        self.store, self.host, self.hosts = store, host, hosts
        self.found = 0
        """Chunks that another host had tokenised."""
        self._offered: deque[tuple[str, int]] = deque()
        self._silent = False

    def owns(self, digest: str) -> bool:
        """Whether this host is the one to tokenise the chunk of a digest: a known order, spread evenly."""
        return int(digest[8:16], 16) % self.hosts == self.host

    def offer(self, digest: str, tokens_N: np.ndarray) -> None:
        """Hand a chunk to the others; the oldest go when ``KEPT_BYTES`` are full."""
        try:
            self._offer(digest, tokens_N)
        except RuntimeError as error:  # of the store; sharing saves work, and no run ends for it
            self._give_up(str(error))

    def find(self, digest: str) -> np.ndarray | None:
        """The chunk, once its host has offered it; None if it is gone or does not come."""
        try:
            return self._find(digest)
        except RuntimeError as error:
            self._give_up(str(error))
            return None

    def _offer(self, digest: str, tokens_N: np.ndarray) -> None:
        self.store.set(digest, tokens_N.dtype.str.encode() + b" " + tokens_N.tobytes())  # type: ignore[arg-type]  # takes bytes too
        self._offered.append((digest, tokens_N.nbytes))
        while sum(size for _, size in self._offered) > KEPT_BYTES and len(self._offered) > 1:
            self.store.set(self._offered.popleft()[0], b"")  # type: ignore[arg-type]  # a host that comes late need not wait

    def _find(self, digest: str) -> np.ndarray | None:
        end = time.monotonic() + (0 if self._silent else PATIENCE)
        while not self.store.check([digest]):
            if time.monotonic() >= end:
                self._give_up(f"none within {PATIENCE:g} s")
                return None
            time.sleep(0.005)
        dtype, _, ids = bytes(self.store.get(digest)).partition(b" ")
        if not ids:
            return None
        self.found += 1
        return np.frombuffer(ids, dtype.decode())

    def _give_up(self, why: str) -> None:
        """Never wait for another host again; told once."""
        if not self._silent:
            logger.warning("another host's tokens do not come (%s); this one tokenises what it needs itself", why)
        self._silent = True


def other_hosts(name: str) -> OtherHosts | None:
    """By torchrun's environment; None on a single host, or where no store is reached.

    Args:
        name: the same for all ranks of a run, another for another stream.
    """
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if hosts < 2:
        return None
    from torch.distributed import DistError, PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # A connection of its own: a chunk on its way keeps no collective waiting.
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False)
    except DistError as error:
        logger.warning("each host tokenises the whole stream: no store at %s:%d (%s)", address, port, error)
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return OtherHosts(PrefixStore(f"documents/{attempt}/{name}", store), int(os.environ["GROUP_RANK"]), hosts)
