"""Start the ranks of ``train`` as torchrun does, but forked from a process that has imported torch: what a rank does
from its command line to its exit status, in a tenth of the time."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import moe_dtensor.train.loop
import moe_dtensor.train.rank  # noqa: F401  (imported here, so that no rank has to)
from moe_dtensor.__main__ import leave, main

_PATIENCE = timedelta(seconds=60)
_HANGS = 100.0
"""Seconds after which a rank that has not ended says where it is."""
_STORES: list[dist.TCPStore] = []
"""Kept: one that is collected in a forked rank waits for a thread that this rank does not have."""


@dataclass
class Ended:
    """How the ranks of a start ended."""

    statuses: list[int]
    """Exit status of each rank; below 0 the signal that killed it."""
    outputs: list[str]
    """Standard output and error of each rank."""
    seconds: float

    @property
    def text(self) -> str:
        return "".join(self.outputs)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Start:
    """Ranks that run ``python -m moe_dtensor`` with ``argv``.

    Args:
        folder: for their outputs.
        argv: the verb and its options.
        world_size: ranks.
        more: words that only some ranks get on their command line.
        environment: variables of all ranks.
        before: called in each rank first, with its number.
        again: ranks that ended; these are started in their place, as ``--max-restarts`` does, and get their store.
    """

    def __init__(
        self,
        folder: Path,
        argv: Sequence[str],
        world_size: int,
        more: Mapping[int, Sequence[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        before: Callable[[int], None] | None = None,
        again: Start | None = None,
    ) -> None:
        self.begin = time.monotonic()
        self.restarts = again.restarts + 1 if again else 0
        # Of this process, as torchrun's agent hosts it.
        self.store = again.store if again else dist.TCPStore("localhost", 0, None, True, _PATIENCE, False)
        _STORES.append(self.store)
        self.files = [folder / f"rank-{rank}-{self.store.port}-{self.restarts}.txt" for rank in range(world_size)]
        self.pids: list[int] = []
        for rank in range(world_size):
            pid = os.fork()
            if pid:
                self.pids.append(pid)
                continue
            try:
                os.environ.update(environment or {})
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
                os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(self.store.port))
                os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(self.restarts))
                output = os.open(self.files[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                torch.set_num_threads(1)
                faulthandler.dump_traceback_later(_HANGS, file=2)
                if before is not None:
                    before(rank)
                leave(main([*argv, *(more or {}).get(rank, ())]))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(99)

    def wait(self, timeout: float = 120.0, grace: float = 10.0) -> Ended:
        """Their ends; when one fails, the others get ``grace`` seconds, as from a launcher."""
        statuses: dict[int, int] = {}
        end = time.monotonic() + timeout
        while len(statuses) < len(self.pids) and time.monotonic() < end:
            for rank, pid in enumerate(self.pids):
                if rank not in statuses:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        statuses[rank] = os.waitstatus_to_exitcode(status)
                        if statuses[rank] != 0:
                            end = min(end, time.monotonic() + grace)
            time.sleep(0.01)
        for rank, pid in enumerate(self.pids):
            if rank not in statuses:
                os.kill(pid, signal.SIGKILL)
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outputs = [file.read_text() if file.exists() else "" for file in self.files]
        return Ended([statuses[rank] for rank in range(len(self.pids))], outputs, time.monotonic() - self.begin)


TINY = {
    "model.num_layers": "2",
    "model.dim": "32",
    "model.num_heads": "4",
    "moe.num_experts": "4",
    "moe.hidden_dim": "16",
    "data.corpus": "random",
    "training.steps": "6",
    "training.seq_len": "16",
    "training.global_batch_size": "8",
    "training.param_dtype": "float32",
    "checkpoint.interval": "2",
    "comm.timeout_seconds": "60",
}


def tiny(folder: Path, **changes: str) -> list[str]:
    """The command line of a tiny run in ``folder``; ``changes`` with ``__`` for the dot."""
    file = folder.parent / "tiny.toml"
    file.write_text("")
    values = {**TINY, "run.folder": str(folder), **{key.replace("__", "."): value for key, value in changes.items()}}
    return ["train", "--config", str(file), *(word for key, value in values.items() for word in (f"--{key}", value))]
