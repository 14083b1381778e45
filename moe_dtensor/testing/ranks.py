"""Run a function on many CPU ranks of this machine, by forking.

A parent that has imported torch forks in a tenth of a second per rank, where ``torchrun`` would
import torch anew in each. Ranks meet over gloo through a file, so no port can be taken.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # what every rank needs in time (an optimizer loads it) is loaded once, before the fork
import torch.distributed as dist

from moe_dtensor.orphans import end_with_parent


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` new processes of this machine; return their results in rank order.

    Results travel by pickle.

    Args:
        timeout: seconds, for all of it and for each collective.
        backend: of the process group; with ``nccl`` rank i takes GPU i.

    Raises:
        RuntimeError: a rank raised (its traceback is the message) or ended without a result.
        TimeoutError: the ranks took longer than ``timeout`` seconds.
    """
    # A parent that has so much as asked for GPUs cannot be forked onto them.
    context: Any = multiprocessing.get_context("spawn" if backend == "nccl" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, f"{folder}/store", timeout, backend, pipes[rank][1], fn, args),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    pending = dict(zip(receivers, range(len(receivers)), strict=True))
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"Ranks {sorted(pending.values())} did not finish within {timeout:.0f} s.")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                ok, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ok, value = False, "the process ended without a result"
            if not ok:
                raise RuntimeError(f"Rank {rank} of {len(receivers)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    backend: str,
    sender: Connection,
    fn: Callable[..., Any],
    args: tuple,
) -> None:
    end_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Tensors as bytes: torch's own way through shared memory needs the sender to stay.
        sender.send_bytes(pickle.dumps((True, fn(*args))))
        dist.barrier()
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sender.close()
    # No interpreter shutdown: gloo threads of a torn-down group can abort there.
    os._exit(0)
