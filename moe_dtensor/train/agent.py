"""The process beside the ranks of a machine: torchrun's agent, which passes signals on and tells one clear status.

torchrun itself ends with 1 whatever its ranks ended with, kills them on the signals that ask for a checkpoint, and
prints a traceback of its own below the error that matters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed.launcher.api as launcher
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from moe_dtensor.config.errors import AGAIN, FAILED, PEER_LOST, WRONG, words
from moe_dtensor.orphans import ASKING, on_asking

START_VARIABLE = "MOE_DTENSOR_START"
"""Set for the ranks: names this start, and says that a launcher tells what killed a rank."""
_GRACE = {AGAIN: 120.0, WRONG: 2.0}
"""Seconds that the other ranks have to end by themselves once one ended with this status."""


def launch(argv: list[str]) -> int:
    """Run ``[torchrun options] VERB ...`` on every rank of this machine; returns the exit status.

    SIGTERM, SIGHUP, SIGUSR1 and a first SIGINT go on to the ranks, which save and end (status 75); a second SIGINT
    ends them at once (130).
    """
    # torchrun tells of each signal and each killed process; what is to be told is told below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    options = torchrun.parse_args(argv)
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script, options.module = "moe_dtensor", True
    # Leave the signals to this module; torchrun wants at least one.
    options.signals_to_handle = "SIGQUIT"
    os.environ[START_VARIABLE] = uuid.uuid4().hex[:12]
    Agent.pass_signals_on()
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        return status_of(error.failures)
    return 0


def status_of(failures: dict[int, ProcessFailure]) -> int:
    """The status of the whole from those of the ranks; ranks that were lost in another's fall do not count."""
    codes = {code_of(failure) for failure in failures.values()} - {PEER_LOST}
    for status in (WRONG, FAILED):
        if status in codes:
            return status
    return AGAIN if codes == {AGAIN} else FAILED


def code_of(failure: ProcessFailure) -> int:
    """A rank's status; one that a passed-on signal ended, since Python had not yet begun in it, has lost nothing, and
    one that was killed here ended with another."""
    if failure.local_rank in Agent.killed_here:
        return PEER_LOST
    return AGAIN if Agent.asked_to_end and -failure.exitcode in ASKING else failure.exitcode


class Agent(LocalElasticAgent):
    """torchrun's agent: tells what killed a rank, and restarts neither a wrong config nor a run asked to end."""

    current: Agent | None = None
    interrupts = 0
    asked_to_end = False
    killed_here: frozenset[int] = frozenset()
    """Ranks of this machine that :func:`close` had to kill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Agent.current = self

    @classmethod
    def pass_signals_on(cls) -> None:
        """Handle the signals that ask for an end."""
        on_asking(cls._on_signal)

    @classmethod
    def _on_signal(cls, number: int, frame: FrameType | None) -> None:
        context = cls.current._pcontext if cls.current else None
        cls.interrupts += number == signal.SIGINT
        cls.asked_to_end = True
        if not isinstance(context, SubprocessContext):
            os._exit(AGAIN)  # no rank runs yet
        at_once = cls.interrupts > 1
        for pid in context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if at_once else signal.SIGUSR1 if number == signal.SIGINT else number)
        if at_once:
            os._exit(130)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        Agent.killed_here = frozenset()
        started = super()._start_workers(worker_group)
        assert isinstance(self._pcontext, SubprocessContext)
        self._pcontext._close = lambda death_sig, timeout=30: close(self._pcontext)  # type: ignore[method-assign]
        return started

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        tell(result.failures, {worker.global_rank: worker.local_rank for worker in worker_group.workers})
        if self.asked_to_end or status_of(result.failures) in (WRONG, AGAIN):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            count = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            say(f"Starting the ranks again ({count} of {self._worker_group.spec.max_restarts}).")
        return result


def close(context: Any) -> None:
    """End the ranks of a machine: those of a run that one rank has left cannot go on, whatever signal they get.

    If that rank alone was asked to end, the others are asked too.
    """
    alive = {rank: handler for rank, handler in context.subprocess_handlers.items() if handler.proc.poll() is None}
    codes = {handler.proc.returncode for rank, handler in context.subprocess_handlers.items() if rank not in alive}
    if AGAIN in codes and not Agent.asked_to_end:
        for handler in alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(handler.proc.pid, signal.SIGUSR1)
    grace = max((_GRACE.get(code, 3.0) for code in codes), default=0.0)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(handler.proc.poll() is None for handler in alive.values()):
        time.sleep(0.05)
    killed = {rank for rank, handler in alive.items() if handler.proc.poll() is None}
    Agent.killed_here |= killed  # kept where torchrun closes once more
    for rank in killed:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(alive[rank].proc.pid, signal.SIGKILL)
        alive[rank].proc.wait(30)


def tell(failures: dict[int, ProcessFailure], local_of: dict[int, int]) -> None:
    """Say what the ranks could not say themselves: a signal that killed one, or that all lost each other.

    Args:
        failures: of this host's ranks, by their number among all.
        local_of: that number to the one on this host.
    """
    host = socket.gethostname()
    mine = {rank: failure for rank, failure in failures.items() if local_of[rank] not in Agent.killed_here}
    for rank, failure in sorted(mine.items()):
        if code_of(failure) < 0:
            name = signal.Signals(-failure.exitcode).name
            cause = " The system's memory may be full (dmesg tells)." if name == "SIGKILL" else ""
            say(words(f"was killed by {name}.{cause}", where=f"rank {rank} on {host} "))
    if mine and all(failure.exitcode == PEER_LOST for failure in mine.values()):
        rank, failure = min(mine.items())
        say(words(read_words(failure.error_file), where=f"rank {rank} on {host}: "))


def read_words(file: str) -> str:
    """What a rank that ended with ``PEER_LOST`` left to be told."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["message"])
    return "a rank on another machine ended."


def say(text: str) -> None:
    """Print to stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
