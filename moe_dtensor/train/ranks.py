"""Start and end of the ranks, what they agree on before and beside their process group, and signals that ask to end.

Ranks meet in torchrun's store first. What may fail on one of them alone (a file that is missing on one host) is done
through :meth:`Ranks.agree`: every rank then ends with one status, and the error is told once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_dtensor.config.command_line import check_meeting
from moe_dtensor.config.errors import AGAIN, FAILED, WRONG, ConfigError, RunError, words
from moe_dtensor.config.schema import Config
from moe_dtensor.orphans import on_asking

T = TypeVar("T")
MOST = 32
"""Ranks that read what all others say; with more, the store would have ranks x ranks to answer."""
STORE_SECONDS = 10.0
"""How long a rank that ends waits for the store."""


class Ended(BaseException):
    """Raised on every rank when the run ends: the status, and the words of the rank that has to say them."""

    def __init__(self, status: int, message: str = "") -> None:
        self.status, self.message = status, message
        super().__init__(message)


class Ranks:
    """This process among the run's ranks, joined by torchrun's store; without torchrun it is the only one.

    Raises:
        ConfigError: the variables that torchrun sets are incomplete.
    """

    def __init__(self) -> None:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            os.environ.setdefault(name, value)
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.host = socket.gethostname()
        self._round = 0
        self.store: Any
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            self.store = self._meet()
        else:
            check_meeting(self.world_size)
            self.store = dist.HashStore()
        self.lost_after = 120.0
        """Seconds without a sign of life after which a rank that is waited for counts as lost."""

    def _meet(self) -> Any:
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=600))))
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT = {place}: {str(error).splitlines()[0]}",
                "Set both to a host and a free port that all of them reach, or start with ./run_train.sh.",
            ) from None
        # A launcher that starts the ranks again keeps its store: what those before them left there is not for these.
        return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    @property
    def where(self) -> str:
        """This rank, in front of an error that is its own; empty for the only rank."""
        return f"rank {self.rank} on {self.host}: " if self.world_size > 1 else ""

    def agree(self, work: Callable[[], T]) -> T:
        """The result of ``work()`` on this rank, once it has succeeded on all.

        However long the work takes: a rank is waited for as long as it gives signs of life.

        Raises:
            Ended: it failed on some rank: with a ConfigError (status 2), a RunError or an OSError.
        """
        error: dict[str, Any] | None = None
        value: Any = None
        try:
            value = work()
        except ConfigError as wrong:
            error = {"status": WRONG, "problem": wrong.problem, "remedy": wrong.remedy}
        except RunError as failed:
            error = {"status": FAILED, "problem": failed.problem, "remedy": failed.remedy}
        except OSError as failed:
            error = {"status": WRONG, "problem": f"{failed.strerror or failed}: {failed.filename}.", "remedy": ""}
        self._raise_together(*self._exchange(error))
        return value

    def _raise_together(self, failures: int, found: dict[int, dict[str, Any]]) -> None:
        if not failures:
            return
        status = max(error["status"] for error in found.values())
        mine = found.get(self.rank)
        common = failures == self.world_size and all(error == mine for error in found.values())
        first = next((rank for rank, error in sorted(found.items()) if error == mine), None)
        if mine is None or first != self.rank:
            raise Ended(status)
        raise Ended(status, words(mine["problem"], mine["remedy"], "" if common else self.where))

    def _exchange(self, error: dict[str, Any] | None) -> tuple[int, dict[int, dict[str, Any]]]:
        """How many ranks have an error, and the errors by rank, of many the first :data:`MOST`. Waits for the slowest.

        The ranks are counted, not asked one by one: all would ask all.
        """
        if self.world_size == 1:
            return int(error is not None), {0: error} if error else {}
        self._round += 1
        place = f"agree/{self._round}"
        if error is not None:
            number = self.store.add(f"{place}/failed", 1)
            self.store.set(f"{place}/failed/{number}", json.dumps([self.rank, error]))
        self.store.set(f"{place}/came/{self.rank}", "")
        self.store.add(f"{place}/came", 1)
        pause, looked = 0.01, time.monotonic()
        signs: dict[int, tuple[Any, float]] = {}
        while self.store.add(f"{place}/came", 0) < self.world_size:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            if self.looks_around:
                if time.monotonic() - looked > self.lost_after / 10:
                    looked = time.monotonic()
                    self._check_signs(place, signs)
            elif self.store.check([f"{place}/lost"]):
                raise RunError(bytes(self.store.get(f"{place}/lost")).decode())
        failures = self.store.add(f"{place}/failed", 0)
        entries = [json.loads(self.store.get(f"{place}/failed/{i}")) for i in range(1, min(failures, MOST) + 1)]
        return failures, dict(entries)

    def _check_signs(self, place: str, signs: dict[int, tuple[Any, float]]) -> None:
        now = time.monotonic()
        for rank in range(self.world_size):
            if self.store.check([f"{place}/came/{rank}"]):
                continue
            sign = self.store.get(f"sign/{rank}") if self.store.check([f"sign/{rank}"]) else None
            if rank not in signs or signs[rank][0] != sign:
                signs[rank] = (sign, now)
            elif now - signs[rank][1] > self.lost_after:
                text = f"rank {rank} gives no sign of life for {self.lost_after:.0f} s, before the first step."
                self.store.set(f"{place}/lost", text)
                raise RunError(text)

    @property
    def looks_around(self) -> bool:
        """Whether this rank reads what others say of themselves: all of a small world, of a large one some."""
        return self.rank % max(1, self.world_size // MOST) == 0

    def claims(self, text: str) -> bool:
        """Whether this rank is the first to tell ``text``; ranks that have the same to say stay silent."""
        try:
            answer = within(STORE_SECONDS, lambda: self.store.add(f"told/{text}", 1))
        except (RuntimeError, dist.DistError):  # the store is gone with its host
            return True
        return answer is None or answer == 1


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """What ``work()`` gives, or None where it takes longer: a store whose host is cut off never answers."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return found[0] if found else None


def start_ranks(config: Config, ranks: Ranks | None = None) -> torch.device:
    """Join the process group (nccl on GPUs, gloo on CPUs; one rank without torchrun); the device of this rank."""
    ranks = ranks or Ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # What the flight recorder keeps of the last collectives is written where a rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=ranks.store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=config.comm.timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    return device


def end_ranks() -> None:
    """Leave the process group together."""
    dist.barrier()
    dist.destroy_process_group()


class EndRequest:
    """Whether this rank was asked to end.

    Before the first step (:meth:`from_now_on_save`) nothing would be lost, and a signal ends the rank where it is;
    later it is noted, and the ranks that look at it together save and end. A second SIGINT ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The signal that asked; 0: none did."""
        self._saves = False

    def listen(self) -> None:
        """Handle the signals that ask for an end."""
        on_asking(self._on_signal)

    def from_now_on_save(self) -> None:
        """From here on a signal is noted only."""
        self._saves = True

    @property
    def name(self) -> str:
        """The signal's name; empty on a rank that got none."""
        return signal.Signals(self.signal).name if self.signal else ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        first, self.signal = not self.signal, number
        if not self._saves and first:
            raise Ended(AGAIN, f"Ended by {self.name} before the first step; the same command starts again.")
