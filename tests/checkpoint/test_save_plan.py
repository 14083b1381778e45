"""Each part of a checkpoint is written by one rank, rank 0 hears of each tensor once, and all is planned once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_dtensor.checkpoint.planner import Layout, Outline, PlanKeeper, Told, index, is_writer
from moe_dtensor.checkpoint.storage import TensorsPlanner
from moe_dtensor.testing.ranks import run_on_ranks

NAMES = [f"layers.{i}.weight" for i in range(12)]


def _state(scale: float) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    values = {name: torch.arange(8.0) * scale + i for i, name in enumerate(NAMES)}
    values["small"] = torch.ones(1) * scale  # the second half of it is empty
    places = {name: (Replicate(), Shard(0) if i % 2 else Replicate()) for i, name in enumerate(NAMES)}
    places["small"] = (Replicate(), Shard(0))
    model: dict[str, Tensor] = {name: distribute_tensor(value, mesh, places[name]) for name, value in values.items()}
    steps = {f"state.{name}.step": torch.tensor(scale) for name in values}
    of_all, of_one = {"bias": torch.full((3,), scale)}, {f"of rank {dist.get_rank()}": torch.tensor(scale)}
    return {"model": model, "optimizer": steps, "balance": of_all, "rng": of_one}


def _save_twice(folder: Path) -> dict[str, Any]:
    keeper, told, heard, written = PlanKeeper(), [], [], []
    for number in (1, 2):
        planner, state = keeper.planner(), _state(float(number))
        local, together, finish = planner.create_local_plan, planner.create_global_plan, planner.finish_plan

        def create_local_plan(local: Any = local) -> SavePlan:
            plan = local()
            told.append(plan.planner_data if plan.usable else None)
            return plan

        def create_global_plan(plans: list[SavePlan], together: Any = together) -> Any:
            heard.append(sum(plan.usable for plan in plans))
            return together(plans)

        def finish_plan(plan: SavePlan, finish: Any = finish) -> SavePlan:
            plan = finish(plan)
            written.append([item.index.fqn for item in plan.items])
            return plan

        planner.create_local_plan, planner.create_global_plan = create_local_plan, create_global_plan
        planner.finish_plan = finish_plan
        dcp.save(state, checkpoint_id=folder / str(number), planner=planner)
    found = {}
    for number in (1, 2):
        state = _state(0.0)
        dcp.load(state, checkpoint_id=folder / str(number), planner=TensorsPlanner())
        want = _state(float(number))
        found[number] = all(
            torch.equal(whole(value), whole(want[table][name]))
            for table, values in state.items()
            for name, value in values.items()
        )
    keeper.drop()
    plan = keeper.planner()
    plan.set_up_planner(_state(1.0), is_coordinator=dist.get_rank() == 0)
    return {
        "told": told,
        "heard": heard,
        "written": written,
        "loads": found,
        "after drop": plan.create_local_plan().usable,
    }


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def test_a_part_is_written_by_one_rank_and_planned_once(tmp_path: Path) -> None:
    ranks = run_on_ranks(_save_twice, 4, tmp_path, timeout=300)
    # Of a sharded tensor two parts, of a replicated one the whole, of an empty part nothing; no part twice.
    expected = [f"model.{name}" for i, name in enumerate(NAMES) for _ in range(1 + i % 2)] + ["model.small"]
    expected += [f"optimizer.state.{name}.step" for name in [*NAMES, "small"]]
    expected += ["balance.bias", *(f"rng.of rank {rank}" for rank in range(4))]
    for save in (0, 1):
        assert sorted(name for rank in ranks for name in rank["written"][save]) == sorted(expected)
    assert min(len(rank["written"][0]) for rank in ranks) > 1, "no rank writes all"
    # Rank 0 hears of each sharded tensor from one rank.
    assert [len(rank["told"][0].tensors) for rank in ranks] == [13, 0, 0, 0]
    assert sum(len(rank["told"][0].claims) for rank in ranks) == 13 + 4 + 4  # steps once, bias and rng from each
    assert [rank["told"][1] for rank in ranks] == [None] * 4
    assert ranks[0]["heard"] == [4, 0]
    assert all(rank["loads"] == {1: True, 2: True} and rank["after drop"] for rank in ranks)
    metadata = FileSystemReader(tmp_path / "1").read_metadata()
    assert metadata.planner_data["optimizer.state.small.step"] == ("optimizer", "state.small.step")
    assert len(metadata.state_dict_metadata["model.small"].chunks) == 1


def _writers() -> list[bool]:
    return [is_writer(name, tensor) for name, tensor in _state(1.0)["model"].items() if name != "small"]


def test_each_name_has_one_writer_of_each_part() -> None:
    for i, writers in enumerate(zip(*run_on_ranks(_writers, 4), strict=True)):
        assert sum(writers) == 1 + i % 2


def _outline(layout: Layout) -> Outline:
    return Outline(layout, TensorProperties(), ("x",))


def test_tensors_that_lie_alike_share_their_parts() -> None:
    """512 parts of each of 100 tensors take the room of 512."""
    layout = Layout(torch.Size([512, 512]), (64, 8), (Shard(1), Shard(0)))
    one, granted = index([Told({"0": _outline(layout)})])
    many, _ = index([Told({str(i): _outline(Layout(*vars(layout).values())) for i in range(100)})])
    assert granted == [frozenset()]
    assert len(many.state_dict_metadata["7"].chunks) == 512
    assert len(pickle.dumps(many)) < 1.3 * len(pickle.dumps(one))


def test_parts_that_do_not_make_up_a_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(torch.Size([8]), (2,), (Shard(0),))
    monkeypatch.setattr(Layout, "parts", lambda self: [])
    with pytest.raises(ValueError, match="do not make it up"):
        index([Told({"x": _outline(layout)})])
