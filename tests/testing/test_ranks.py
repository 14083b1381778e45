"""Forked ranks: results in order, failures told."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from moe_dtensor.testing.ranks import run_on_ranks


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
