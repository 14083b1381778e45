"""The launcher's status where it had to kill ranks itself."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from moe_dtensor.config.errors import AGAIN
from moe_dtensor.train import agent
from moe_dtensor.train.agent import Agent, close, status_of

DEAF = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def test_ranks_that_had_to_be_killed_do_not_make_a_failure_of_an_end_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun closes the ranks twice; after the second time they counted."""
    monkeypatch.setattr(agent, "_GRACE", {AGAIN: 0.2})
    monkeypatch.setattr(Agent, "killed_here", frozenset())
    ended = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({AGAIN})"])
    ended.wait()
    deaf = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, start_new_session=True)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    deaf.stdout.close()
    context = SimpleNamespace(subprocess_handlers={0: SimpleNamespace(proc=ended), 1: SimpleNamespace(proc=deaf)})
    close(context)
    close(context)
    codes = {0: AGAIN, 1: deaf.returncode}
    assert codes[1] == -9
    failures = {rank: SimpleNamespace(local_rank=rank, exitcode=code) for rank, code in codes.items()}
    assert status_of(failures) == AGAIN
