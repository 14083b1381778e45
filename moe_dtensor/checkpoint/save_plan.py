"""What each rank writes of a checkpoint, planned once and kept for the saves that follow."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor, Placement

_NUMBERS = count()


class PlanKeeper:
    """The plans of one state whose tensors keep their names, shapes and places from save to save.

    torch keeps them by a class's name and for good; here they belong to one manager and can be dropped.
    """

    def __init__(self) -> None:
        self._key = f"moe_dtensor {next(_NUMBERS)}"

    def planner(self) -> SavePlanner:
        """For the next save."""
        return _Planner(self._key)

    def drop(self) -> None:
        """Plan anew: the state is another one, or a save failed."""
        for kept in (
            SavePlanner._cached_save_plan,
            SavePlanner._cached_final_save_plan,
            SavePlanner._cached_all_plans,
            SavePlanner._cached_global_plan,
            SavePlanner._cached_metadata,
        ):
            kept.pop(self._key, None)


class _Planner(DefaultSavePlanner):
    """Of what several ranks hold alike one names itself the writer, so that rank 0 hears of each part once.

    With all ranks' plans of all parts, rank 0's work would grow with the copies; that no rank writes more than others
    is left to chance: the writer follows from a tensor's name.
    """

    def __init__(self, key: str) -> None:
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = key

    def create_local_plan(self) -> SavePlan:
        """What this rank writes; not usable where rank 0 knows it from the save before."""
        plan = super().create_local_plan()
        if not plan.usable:
            return plan
        return replace(plan, items=[item for item in plan.items if self._writes(item.index.fqn)])

    def _writes(self, name: str) -> bool:
        value = self.state_dict[name]
        return not isinstance(value, DTensor) or is_writer(name, value)


def is_writer(name: str, tensor: DTensor) -> bool:
    """Whether this rank writes its part, of the ranks that hold the same."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return coordinate is not None and writes(name, mesh.shape, tensor.placements, coordinate)


def writes(name: str, shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]) -> bool:
    """The same for the rank at a coordinate of a mesh."""
    number, copies = 0, 1
    for place, size, index in zip(placements, shape, coordinate, strict=True):
        if place.is_replicate():
            number, copies = number * size + index, copies * size
    return number == zlib.crc32(name.encode()) % copies
