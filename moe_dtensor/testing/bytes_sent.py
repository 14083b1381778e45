"""Count the bytes that this rank sends, by mesh axis and collective, while real code runs.

Counted is what the algorithm must move, not what a link carries: of an all-gather this rank's part to each other rank,
of a reduce-scatter the parts of the others, of an all-reduce both halves (rings; the same convention as
:mod:`moe_dtensor.estimate.traffic`), of an all-to-all the rows for others, of a send its tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode


class BytesSent(TorchDispatchMode):
    """A context in which this rank's collectives are counted: forward, backward, FSDP, pipeline, optimizer.

    Within compiled code they are counted too, if it was compiled before: inside the context torch compiles nothing and
    runs eagerly what is not compiled yet, so let a step go by first.

    ::

        with BytesSent(trainer.mesh) as sent:
            trainer.runner.step(batch, scale)
        sent.by_axis()        # {"dp": 1024, "tp": 4096}
        sent.by_collective()  # {("dp", "all_gather"): 512, ...}
        sent.calls            # Counter({("dp", "all_gather"): 2, ...})

    Args:
        mesh: the whole one, with named axes. A group counts under the first axis with the same ranks, axes flattened
            out of the mesh before after those it was made with, or under the smallest that it is a part of; else as
            ``world``, or by its ranks (``0,2``).
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.names = self._named_ranks()
        self.bytes: Counter[tuple[str, str]] = Counter()
        """Bytes by (axis, collective)."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """Calls by (axis, collective), groups of one rank left out."""

    def by_axis(self) -> dict[str, int]:
        """Bytes by axis."""
        sums: Counter[str] = Counter()
        for (axis, _), count in self.bytes.items():
            sums[axis] += count
        return dict(sums)

    def by_collective(self) -> dict[tuple[str, str], int]:
        """Bytes by (axis, collective)."""
        return dict(self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Tensor) and t is not Tensor and t is not torch.nn.Parameter for t in types):
            return NotImplemented  # DTensors and tensors on their way: their own code calls the collectives
        kwargs = kwargs or {}
        collective = func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")
        if collective or func._schema.name in ONE_SIDED:
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        name, group = func._schema.name.split("::")[1], _group_of(given)
        if group is None or group.size() == 1 or name in SILENT:
            return
        if name not in _COUNTERS:
            raise NotImplementedError(f"BytesSent does not know how much {func} sends.")
        kind, count = _COUNTERS[name]
        key = (self._axis(group), kind)
        self.calls[key] += 1
        self.bytes[key] += count(given, group)

    def _axis(self, group: dist.ProcessGroup) -> str:
        """By the ranks: torch keeps groups of earlier meshes alive, and uses them for axes that are alike."""
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks in self.names:
            return self.names[ranks]
        around = [(len(axis), name) for axis, name in self.names.items() if set(ranks) < set(axis) and name != "world"]
        return min(around)[1] if around else ",".join(map(str, ranks))

    def _named_ranks(self) -> dict[tuple[int, ...], str]:
        axes = {name: self.mesh[name] for name in self.mesh.mesh_dim_names or ()} | self.mesh._flatten_mapping
        names: dict[tuple[int, ...], str] = {}
        for name, axis in axes.items():
            names.setdefault(tuple(axis.mesh.flatten().tolist()), name)
        names.setdefault(tuple(range(dist.get_world_size())), "world")
        return names


SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv")
"""Operators that send nothing, or whose sender counts."""
ONE_SIDED = ("moe_dtensor::gather_permute", "moe_dtensor::unpermute_scatter")
"""Operators of ours that reach the memory of other ranks; what they call is not seen here."""
Count = Callable[[dict[str, Any], dist.ProcessGroup], int]


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup | None:
    group = given.get("process_group", given.get("group_name", given.get("group")))
    if group is None:
        return None
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, Iterable)
    return sum(map(_size, tensors))


def _input(given: dict[str, Any]) -> Any:
    names = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensor", "tensors", "x")
    return next(given[name] for name in names if name in given)


def _to_each_other(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    """The input goes to every other rank."""
    return _size(_input(given)) * (group.size() - 1)


def _parts_of_others(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    """All parts of the input but one's own are sent away."""
    return _size(_input(given)) * (group.size() - 1) // group.size()


def _both_halves(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    return 2 * _size(_input(given)) * (group.size() - 1) // group.size()


def _rows_for_others(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    """Of an all-to-all with split sizes, in rows; without them all parts are alike."""
    x = _input(given)
    rows = list(given.get("input_split_sizes") or ())
    if not rows:
        return _parts_of_others(given, group)
    others = sum(rows) - rows[group.rank()]
    return others * (_size(x) // x.shape[0]) if x.shape[0] else 0


def _tokens_of_others(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    """A sum for each token of the other ranks."""
    y, tokens = given["y"], given["position"].shape[0]
    return tokens * (group.size() - 1) // group.size() * y.shape[1] * y.element_size()


def _as_it_is(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    return _size(_input(given))


_COUNTERS: dict[str, tuple[str, Count]] = {
    **dict.fromkeys(
        (
            "all_gather_into_tensor",
            "all_gather_into_tensor_out",
            "all_gather_into_tensor_coalesced",
            "allgather_",
            "allgather_coalesced_",
            "_allgather_base_",
            "allgather_into_tensor_coalesced_",
        ),
        ("all_gather", _to_each_other),
    ),
    **dict.fromkeys(
        (
            "reduce_scatter_tensor",
            "reduce_scatter_tensor_out",
            "reduce_scatter_tensor_coalesced",
            "reduce_scatter_",
            "_reduce_scatter_base_",
            "reduce_scatter_tensor_coalesced_",
        ),
        ("reduce_scatter", _parts_of_others),
    ),
    **dict.fromkeys(
        (
            "all_reduce",
            "all_reduce_",
            "all_reduce_coalesced",
            "all_reduce_coalesced_",
            "allreduce_",
            "allreduce_coalesced_",
        ),
        ("all_reduce", _both_halves),
    ),
    **dict.fromkeys(("all_to_all_single", "alltoall_base_"), ("all_to_all", _rows_for_others)),
    "alltoall_": ("all_to_all", _parts_of_others),
    **dict.fromkeys(("send", "isend"), ("send", _as_it_is)),
    "gather_permute": ("one_sided", _to_each_other),
    "unpermute_scatter": ("one_sided", _tokens_of_others),
}
"""Operators of torch: what they are called here, and how many bytes one rank sends."""
