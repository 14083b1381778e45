"""Each part of a checkpoint is planned by one rank, and planned once for all saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_dtensor.checkpoint.storage import PlanKeeper, TensorsPlanner, is_writer
from moe_dtensor.testing.ranks import run_on_ranks

NAMES = [f"layers.{i}.weight" for i in range(12)]


def _state(scale: float) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    values = {name: torch.arange(8.0) * scale + i for i, name in enumerate(NAMES)}
    places = {name: (Replicate(), Shard(0) if i % 2 else Replicate()) for i, name in enumerate(NAMES)}
    return {name: distribute_tensor(value, mesh, places[name]) for name, value in values.items()}


def _save_twice(folder: Path) -> dict[str, Any]:
    keeper, sent, planned = PlanKeeper(), [], []
    for number in (1, 2):
        planner, state = keeper.planner(), _state(float(number))
        local, together = planner.create_local_plan, planner.create_global_plan

        def create_local_plan(local: Any = local) -> SavePlan:
            plan = local()
            sent.append([item.index.fqn for item in plan.items] if plan.usable else None)
            return plan

        def create_global_plan(plans: list[SavePlan], together: Any = together) -> Any:
            planned.append(sum(plan.usable for plan in plans))
            return together(plans)

        planner.create_local_plan, planner.create_global_plan = create_local_plan, create_global_plan
        dcp.save(state, checkpoint_id=folder / str(number), planner=planner)
    found = {}
    for number in (1, 2):
        state = _state(0.0)
        dcp.load(state, checkpoint_id=folder / str(number), planner=TensorsPlanner())
        want = _state(float(number))
        found[number] = all(torch.equal(whole(state[name]), whole(want[name])) for name in NAMES)
    keeper.drop()
    plan = keeper.planner()
    plan.set_up_planner(_state(1.0), is_coordinator=dist.get_rank() == 0)
    return {"sent": sent, "planned": planned, "loads": found, "after drop": plan.create_local_plan().usable}


def whole(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def test_a_part_is_planned_by_one_rank_and_once(tmp_path: Path) -> None:
    ranks = run_on_ranks(_save_twice, 4, tmp_path, timeout=300)
    first = sorted(name for rank in ranks for name in rank["sent"][0])
    # Of a sharded tensor two parts, of a replicated one the whole; no part twice.
    assert first == sorted([name for i, name in enumerate(NAMES) for _ in range(1 + i % 2)])
    assert min(len(rank["sent"][0]) for rank in ranks) > 0, "no rank writes all"
    assert [rank["sent"][1] for rank in ranks] == [None] * 4
    assert ranks[0]["planned"] == [4, 0]
    assert all(rank["loads"] == {1: True, 2: True} and rank["after drop"] for rank in ranks)


def _writers() -> list[bool]:
    return [is_writer(name, tensor) for name, tensor in _state(1.0).items() if isinstance(tensor, DTensor)]


def test_each_name_has_one_writer_of_each_part() -> None:
    for i, writers in enumerate(zip(*run_on_ranks(_writers, 4), strict=True)):
        assert sum(writers) == 1 + i % 2
