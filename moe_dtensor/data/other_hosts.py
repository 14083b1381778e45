"""What the hosts of a run tell each other of a stream's chunks, through the store that its ranks met by."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)
KEPT_BYTES = 64 << 20  # of its own chunks, for hosts that come later
PATIENCE = 20.0  # seconds after which a host tokenises another's chunk itself


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
