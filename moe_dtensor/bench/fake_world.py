"""One rank of a large world, alone on this machine: what its start, step and checkpoint planning cost in Python.

    python -m moe_dtensor.bench.fake_world --config F --mesh 128x4x8 [--rank R] [--table.key value ...]

The process group is torch's fake one: collectives return at once and bring nothing, so values mean nothing, and what
is left is the work of the host: process groups, modules, DTensors, hooks, planning. Widths should be small
(``--model.dim 64``), numbers of layers, experts and ranks the real ones.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dtensor.checkpoint.storage import PlanKeeper, writes
from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.train.build import build, set_vocabulary
from moe_dtensor.train.step import read_batch, train_step


def measure(config: Config, rank: int, most_parts: int = 1_000_000) -> dict[str, Any]:
    """Build, take a step and plan a checkpoint as ``rank`` of the config's mesh.

    Args:
        config: not resolved.
        rank: which; 0 also plans for all ranks of its pipeline stage.
        most_parts: of a checkpoint that rank 0 plans here; more take too much memory.

    Returns:
        Seconds by stage, resident memory in MiB, process groups, and the step's collectives by axis and kind.
    """
    seconds: dict[str, float] = {}
    timed = partial(_timed, seconds)
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
    keeper = PlanKeeper()
    with timed("local plan"):
        planner = keeper.planner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
    parts = sum(_parts(value) for value in state.values())
    if rank == 0 and parts <= most_parts:
        plans = _plans_of_all(state, plan, world)
        with timed("plan of all ranks"):
            planner.create_global_plan(plans)
        planner.finish_plan(plan)
        with timed("the same at the next save"):
            planner = keeper.planner()
            planner.set_up_planner(state, is_coordinator=True)
            planner.create_local_plan()
            planner.create_global_plan([SavePlan([], usable=False)] * world)
    return {
        "mesh": f"{mesh.dp}x{mesh.pp}x{mesh.tp}",
        "rank": rank,
        "seconds": seconds,
        "resident MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "process groups": len(_world.pg_map),
        "items of a rank's plan": len(plan.items),
        "parts of all ranks": parts,
        "collectives of a step": calls,
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def _parts(value: Any) -> int:
    """In how many parts a tensor of the state is written: one from each rank but for those that hold the same."""
    if not isinstance(value, DTensor):
        return 1
    return math.prod(
        value.device_mesh.size(axis) for axis, place in enumerate(value.placements) if not place.is_replicate()
    )


def _plans_of_all(state: dict[str, Any], own: SavePlan, world: int) -> list[SavePlan]:
    """What all ranks of this one's stage would send to rank 0, worked out here from where each part lies."""
    items: list[list[WriteItem]] = [[] for _ in range(world)]
    for name, value in state.items():
        if not isinstance(value, DTensor):
            continue
        mesh, properties = value.device_mesh, TensorProperties.create_from_tensor(value.to_local())
        for coordinate in itertools.product(*(range(size) for size in mesh.shape)):
            if not writes(name, mesh.shape, value.placements, coordinate):
                continue
            sizes, offsets = _compute_local_shape_and_global_offset(
                value.shape, mesh.shape, list(coordinate), value.placements
            )
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            part = TensorWriteData(chunk, properties, value.size())
            item = WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=part)
            items[int(mesh.mesh[coordinate])].append(item)
    plans = [SavePlan(of_rank, planner_data={}) for of_rank in items]
    return [replace(own, items=own.items), *plans[1:]]


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
