"""One rank of a large world, alone on this machine: what its start, step and checkpoint planning cost in Python.

    python -m moe_dtensor.bench.fake_world --config F --mesh 128x4x8 [--rank R] [--table.key value ...]

The process group is torch's fake one: collectives return at once and bring nothing, so values mean nothing, and what
is left is the work of the host: process groups, modules, DTensors, hooks, planning. Widths should be small
(``--model.dim 64``), numbers of layers, experts and ranks the real ones.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.distributed_c10d import _world
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.train.build import build, set_vocabulary
from moe_dtensor.train.step import read_batch, train_step


def measure(config: Config, rank: int) -> dict[str, Any]:
    """Build, take a step and plan a checkpoint as ``rank`` of the config's mesh.

    Returns:
        Seconds by stage, resident memory in MiB, process groups, and the step's collectives by axis and kind.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - start, 2)

    mesh = config.mesh
    world = mesh.dp * mesh.pp * mesh.tp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    config = resolve(config, world)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    with timed("build"):
        trainer = build(config, torch.device("cpu"))
    loader = Loader(config, corpus)
    calls: dict[str, int] = {}
    if mesh.pp == 1:  # stages of a pipeline ask each other for shapes, and would hear noise
        with timed("first step"):
            train_step(trainer, read_batch(trainer, loader))
        with BytesSent(trainer.mesh) as sent, timed("step"):
            train_step(trainer, read_batch(trainer, loader))
        calls = {f"{axis} {kind}": count for (axis, kind), count in sorted(sent.calls.items())}
    state = {name: value for part in trainer.parts for name, value in part.state_dict().items()}
    state |= trainer.optimizers.state_dict()
    with timed("local plan"):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
    return {
        "mesh": f"{mesh.dp}x{mesh.pp}x{mesh.tp}",
        "rank": rank,
        "seconds": seconds,
        "resident MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "process groups": len(_world.pg_map),
        "items of a rank's plan": len(plan.items),
        "collectives of a step": calls,
    }


def main(argv: list[str]) -> int:
    """Print the measurement as JSON."""
    parser = Parser("fake_world", "one rank of a large world")
    parser.add_argument("--mesh", required=True, metavar="DPxPPxTP")
    parser.add_argument("--rank", type=int, default=0)
    options, config = parser.load(argv)
    dp, pp, tp = map(int, options.mesh.split("x"))
    config = replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp))
    print(json.dumps(measure(config, options.rank), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
