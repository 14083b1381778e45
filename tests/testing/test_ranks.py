"""Forked ranks: results in order, failures told."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moe_dtensor.testing.ranks import run_on_ranks
from tests.processes import children, is_alive


def _sum() -> tuple[int, torch.Tensor]:
    x = torch.full((1000,), float(dist.get_rank()))
    dist.all_reduce(x)
    return dist.get_rank(), x


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("a certain message")
    dist.barrier()


def _sleep() -> None:
    time.sleep(60)


def test_results_come_in_rank_order() -> None:
    ranks = run_on_ranks(_sum, 3)
    assert [rank for rank, _ in ranks] == [0, 1, 2]
    assert all(torch.equal(x, torch.full((1000,), 3.0)) for _, x in ranks)


def test_a_failing_rank_raises_here_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Rank \d of 2 failed.*(a certain message|Connection)"):
        run_on_ranks(_fail_on_rank_1, 2, timeout=20)


def test_ranks_that_hang_are_ended() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="did not finish within 1 s"):
        run_on_ranks(_sleep, 2, timeout=1.0)
    assert time.monotonic() - start < 20


def test_ranks_end_with_the_process_that_started_them() -> None:
    """They went on, waiting for each other, when verify was killed."""
    parent = os.fork()
    if not parent:
        run_on_ranks(_sleep, 2)
        os._exit(0)
    end = time.monotonic() + 30
    while len(ranks := children(parent)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    assert all(map(is_alive, ranks))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while any(map(is_alive, ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, ranks))
