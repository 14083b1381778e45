"""Who writes which part of a checkpoint, planned where each tensor's layout is known rather than on one rank.

torch's planner has every rank name each of its parts to rank 0, which then looks through ranks x tensors of them. Here
a rank works out by itself what it writes. Rank 0 hears of each tensor once, from the first rank of its mesh: size,
dtype, mesh and placements, from which follow the parts of all ranks. Tensors that lie alike share one list of parts,
in memory and in the index.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut."""

    size: torch.Size
    mesh: tuple[int, ...]
    """Sizes of the axes; none for a tensor that is no DTensor."""
    placements: tuple[Placement, ...]

    def parts(self) -> list[ChunkStorageMetadata]:
        """Each part once, those without elements left out."""
        if 0 in self.size:
            return []
        return [ChunkStorageMetadata(offset, size) for _, offset, size in parts(self)]


def parts(layout: Layout) -> Iterator[tuple[tuple[int, ...], torch.Size, torch.Size]]:
    """Of each part of a tensor the first coordinate that holds it, its offset and its size."""
    axes = [range(1 if p.is_replicate() else n) for p, n in zip(layout.placements, layout.mesh, strict=True)]
    for coordinate in itertools.product(*axes):
        size, offset = _compute_local_shape_and_global_offset(
            layout.size, layout.mesh, list(coordinate), layout.placements
        )
        if 0 not in size:
            yield coordinate, torch.Size(offset), torch.Size(size)


@dataclass(frozen=True)
class Outline:
    """What rank 0 hears of a tensor."""

    layout: Layout
    properties: TensorProperties
    path: tuple[Any, ...]
    """Keys that lead to it in the nested state."""


@dataclass(frozen=True)
class Told:
    """What a rank tells rank 0."""

    tensors: dict[str, Outline] = field(default_factory=dict)
    """DTensors of whose mesh it is the first rank."""
    claims: dict[str, Outline] = field(default_factory=dict)
    """Plain tensors that it could write; the lowest rank that claims one does."""


class PlanKeeper:
    """What was planned for one state, whose tensors keep their names, shapes and places from save to save."""

    def __init__(self) -> None:
        self.drop()

    def planner(self) -> SavePlanner:
        """For the next save."""
        return _Planner(self)

    def drop(self) -> None:
        """Plan anew: the state is another one, or a save failed."""
        self.told: Told | None = None
        """What this rank told rank 0."""
        self.granted: frozenset[str] = frozenset()
        """Its claims that rank 0 granted."""
        self.told_by_all: list[Told] = []
        """On rank 0."""
        self.metadata: Metadata | None = None
        """On rank 0."""


class _Planner(DefaultSavePlanner):
    """One save's planner; a state of tensors only."""

    def __init__(self, keeper: PlanKeeper) -> None:
        super().__init__()
        self._keeper = keeper
        self._told = Told()
        self._own: list[WriteItem] = []

    def create_local_plan(self) -> SavePlan:
        """What rank 0 has to hear from this rank; not usable where it knows from the save before."""
        self._told = Told()
        self._own = [item for item in super().create_local_plan().items if self._may_write(item)]
        if self._told == self._keeper.told:
            return SavePlan([], usable=False)
        return SavePlan([], planner_data=self._told)

    def _may_write(self, item: WriteItem) -> bool:
        """Whether this rank writes a part, as far as it knows; takes down what rank 0 has to hear."""
        name, data = item.index.fqn, item.tensor_data
        assert data is not None, f"{name} is no tensor"
        value = self.state_dict[name]
        if isinstance(value, DTensor):
            if is_first(value):
                layout = Layout(data.size, value.device_mesh.shape, tuple(value.placements))
                self._told.tensors[name] = Outline(layout, data.properties, self.mappings[name])
            return value.to_local().numel() > 0 and is_writer(name, value)
        if claims(name, self.state_dict):
            self._told.claims[name] = Outline(Layout(data.size, (), ()), data.properties, self.mappings[name])
        return name in self._told.claims

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On rank 0: the index, and to each rank the claims that it may write."""
        keeper = self._keeper
        if keeper.metadata is not None and not any(plan.usable for plan in all_plans):
            return [SavePlan([], usable=False)] * len(all_plans), keeper.metadata
        before = keeper.told_by_all or [Told()] * len(all_plans)
        keeper.told_by_all = [
            plan.planner_data if plan.usable else old for plan, old in zip(all_plans, before, strict=True)
        ]
        keeper.metadata, granted = index(keeper.told_by_all)
        return [SavePlan([], planner_data=names) for names in granted], keeper.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """What this rank writes."""
        keeper = self._keeper
        if new_plan.usable:
            keeper.granted = new_plan.planner_data
        keeper.told = self._told
        refused = self._told.claims.keys() - keeper.granted
        items = [item for item in self._own if item.index.fqn not in refused]
        self.plan = SavePlan(items, storage_data=new_plan.storage_data)
        return self.plan


def index(told_by_all: Sequence[Told]) -> tuple[Metadata, list[frozenset[str]]]:
    """The index of all tensors, and of each rank the claims that are granted.

    Raises:
        ValueError: the parts of a tensor do not make it up.
    """
    lists: dict[Layout, list[ChunkStorageMetadata]] = {}
    entries: dict[str, STORAGE_TYPES] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    granted: list[frozenset[str]] = []
    for told in told_by_all:
        mine = frozenset(name for name in told.claims if name not in entries)
        granted.append(mine)
        for name, outline in [*told.tensors.items(), *((name, told.claims[name]) for name in sorted(mine))]:
            layout = outline.layout
            if layout not in lists:
                lists[layout] = layout.parts()
                if sum(math.prod(part.sizes) for part in lists[layout]) != layout.size.numel():
                    raise ValueError(f"The parts of {name} do not make it up: {layout}.")
            entries[name] = TensorStorageMetadata(outline.properties, layout.size, lists[layout])
            paths[name] = outline.path
    return Metadata(entries, planner_data=paths), granted


def claims(name: str, state: dict[str, Any]) -> bool:
    """Whether this rank would write a plain tensor.

    Of a parameter's count of steps, which all ranks of the parameter hold, one does, by its name; of all else each.
    """
    parameter = state.get(f"model.{name.removeprefix('optimizer.state.').rpartition('.')[0]}")
    if not name.startswith("optimizer.state.") or not isinstance(parameter, DTensor):
        return True
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    return coordinate is not None and writes(name, mesh.shape, [Replicate()] * mesh.ndim, coordinate)


def is_first(tensor: DTensor) -> bool:
    """Whether this is the first rank of a tensor's mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def is_writer(name: str, tensor: DTensor) -> bool:
    """Whether this rank writes its part, of the ranks that hold the same."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return coordinate is not None and writes(name, mesh.shape, tensor.placements, coordinate)


def writes(name: str, shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]) -> bool:
    """The same for the rank at a coordinate of a mesh.

    That no rank writes more than others is left to chance: the writer follows from the name.
    """
    number, copies = 0, 1
    for place, size, at in zip(placements, shape, coordinate, strict=True):
        if place.is_replicate():
            number, copies = number * size + at, copies * size
    return number == zlib.crc32(name.encode()) % copies
