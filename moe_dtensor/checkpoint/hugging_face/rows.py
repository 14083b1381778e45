"""A family's table applied to one model: every tensor of ours and of the files accounted for. Reads
:class:`.table.Tensor`, whose axes are letters: how a tensor of ours, or a slice of it, lies in a file tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor as Values

from moe_dtensor.checkpoint.hugging_face.table import Family, Function, Tensor
from moe_dtensor.checkpoint.hugging_face.translate import function_of, has_selection_bias
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer

Range = tuple[int, int]
"""From (included) and to (excluded)."""
EXTRAS = (
    r".*rotary_emb\.inv_freq",
    r".*\.attention\.(masked_)?bias",
    r"(model\.)?mtp(_\w+)?\..*",
    r"model\.mtp_.*",
)
"""File tensors of any family that may be left unused: tables that are computed, modules for predicting further."""


def parse(pattern: str) -> tuple[tuple[str, ...], ...]:
    """``"e (g f) d"`` to ``(("e",), ("g", "f"), ("d",))``: the axes of each dimension."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", pattern))


@dataclass(frozen=True)
class Row:
    """One row of a table for one block of one model: with shapes.

    Args:
        entry: of the table.
        native: our tensor's name.
        file: the file tensor's, with ``{e}`` and the like still open.
        shape: ours, padded rows of the vocabulary included.
        sizes: of every axis, as files have them.
        rotated: width of the part of a head that is turned, where that is not all.
        start: where this part begins along the file tensor's first dimension.
        whole: that dimension of the whole file tensor.
    """

    entry: Tensor
    native: str
    file: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    rotated: int = 0
    start: int = 0
    whole: int = 0

    @cached_property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """Axes of each of our dimensions."""
        return parse(self.entry.axes)

    @cached_property
    def named(self) -> tuple[str, ...]:
        """Our axes that are in the file's name."""
        return tuple(axis for dim in self.dims for axis in dim if f"{{{axis}}}" in self.file)

    @cached_property
    def layout(self) -> tuple[tuple[str, ...], ...]:
        """Axes of each dimension of the file tensor."""
        if self.entry.layout:
            return parse(self.entry.layout)
        return tuple(dim for dim in self.dims if dim[0] not in self.named)

    @cached_property
    def part_shape(self) -> tuple[int, ...]:
        """Of what this row has in a file tensor."""
        return tuple(math.prod(self.sizes[axis] for axis in dim) for dim in self.layout)

    @cached_property
    def file_shape(self) -> tuple[int, ...]:
        """Of a whole file tensor."""
        return (self.whole or self.part_shape[0], *self.part_shape[1:])

    def files(self, held: Sequence[Range] | None = None) -> Iterator[tuple[str, dict[str, int]]]:
        """Names of the file tensors that hold our tensor, or a slice of it, and the index of each named axis."""
        ranges = self._ranges(held)
        for indices in product(*(range(*ranges[axis]) for axis in self.named)):
            at = dict(zip(self.named, indices, strict=True))
            words = {axis: self.entry.words[axis][i] if axis in self.entry.words else i for axis, i in at.items()}
            yield self.file.format(**words), at

    def _ranges(self, held: Sequence[Range] | None) -> dict[str, Range]:
        """What of each axis a slice of ours needs; all of it where the slice cuts a grouped one unevenly."""
        ranges = {axis: (0, size) for axis, size in self.sizes.items()}
        for dim, (low, high) in zip(self.dims, held or (), strict=False):
            rest = math.prod(self.sizes[axis] for axis in dim[1:])
            size = self.sizes[dim[0]]
            if low % rest == 0 and (high % rest == 0 or high >= size * rest):
                ranges[dim[0]] = (min(low // rest, size), min(-(-high // rest), size))
        return ranges

    def needed(self, held: Sequence[Range] | None) -> list[Range]:
        """Rows, columns, … of a file tensor to read for a slice of ours."""
        ranges = self._ranges(held)
        needed = []
        for number, dim in enumerate(self.layout):
            rest = math.prod(self.sizes[axis] for axis in dim[1:])
            low, high = self.entry.fixed.get(dim[0], ranges[dim[0]])
            if dim[0] in self.entry.fixed:
                low, high = 0, self.sizes[dim[0]]
            start = self.start if number == 0 else 0
            needed.append((start + low * rest, start + high * rest))
        return needed

    def place(self, values: Values, at: Mapping[str, int], held: Sequence[Range], out: Values) -> None:
        """Put what :meth:`needed` asked of one file tensor where it belongs in a slice of ours; padded rows stay."""
        ranges = self._ranges(held)
        if any(low >= high for low, high in ranges.values()):
            return  # nothing but padding
        sizes = {axis: high - low for axis, (low, high) in ranges.items()} | self._fixed_sizes()
        values = self._spread(values, self.layout, sizes)
        order = [axis for dim in self.layout for axis in dim]
        for axis, (index, _) in self.entry.fixed.items():
            values = values.select(order.index(axis), index)
            order.remove(axis)
        for axis in self.entry.order:
            values = values.index_select(order.index(axis), file_order(self.sizes[axis], self.rotated))
        rest = [[axis for axis in dim if axis not in self.named] for dim in self.dims]
        values = values.permute([order.index(axis) for dim in rest for axis in dim])
        values = values.reshape([math.prod(sizes[axis] for axis in dim) for dim in rest if dim])
        target = out[
            tuple(at[dim[0]] - held[i][0] if dim[0] in self.named else slice(None) for i, dim in enumerate(self.dims))
        ]
        for number, (dim, (low, high)) in enumerate(
            (dim, cut) for dim, cut in zip(self.dims, held, strict=True) if dim[0] not in self.named
        ):
            step = math.prod(self.sizes[axis] for axis in dim[1:])
            first = ranges[dim[0]][0] * step
            values = values.narrow(number, max(low - first, 0), min(high - low, values.shape[number]))
        target[tuple(slice(0, size) for size in values.shape)].copy_(values)

    def take(self, values: Values, at: Mapping[str, int]) -> Values:
        """Of our whole tensor, what this row has in one file tensor: :meth:`place` the other way."""
        index: list[Any] = [at[dim[0]] if dim[0] in self.named else slice(None) for dim in self.dims]
        values = values[tuple(index)]
        rest = [dim for dim in self.dims if dim[0] not in self.named]
        for number, dim in enumerate(rest):
            values = values.narrow(number, 0, math.prod(self.sizes[axis] for axis in dim))
        values = self._spread(values, rest, self.sizes)
        order = [axis for dim in rest for axis in dim]
        for axis in self.entry.order:
            back = file_order(self.sizes[axis], self.rotated).argsort()
            values = values.index_select(order.index(axis), back)
        wanted = [axis for dim in self.layout for axis in dim if axis not in self.entry.fixed]
        return values.permute([order.index(axis) for axis in wanted])

    def store(self, values: Values, at: Mapping[str, int], out: Values) -> None:
        """Write :meth:`take`'s values into a whole file tensor."""
        part = out.narrow(0, self.start, self.part_shape[0])
        view = self._spread(part, self.layout, self.sizes)
        order = [axis for dim in self.layout for axis in dim]
        for axis, (index, _) in self.entry.fixed.items():
            view = view.select(order.index(axis), index)
            order.remove(axis)
        view.copy_(self.take(values, at))

    def _fixed_sizes(self) -> dict[str, int]:
        return {axis: size for axis, (_, size) in self.entry.fixed.items()}

    @staticmethod
    def _spread(values: Values, dims: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Values:
        """Every axis a dimension of its own."""
        return (
            values.view([sizes[axis] for dim in dims for axis in dim])
            if values.is_contiguous()
            else _unflatten(values, dims, sizes)
        )


def _unflatten(values: Values, dims: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Values:
    for number in reversed(range(len(dims))):
        if len(dims[number]) > 1:
            values = values.unflatten(number, [sizes[axis] for axis in dims[number]])
    return values


def axis_sizes(entry: Tensor, shape: Sequence[int], function: Function) -> dict[str, int]:
    """Of every axis of a row: known by its letter, or what our shape leaves."""
    sizes = {
        "h": function["model.num_heads"],
        "k": function["model.num_kv_heads"],
        "c": function["model.head_dim"],
        "two": 2,
        "one": 1,
    } | {axis: size for axis, (_, size) in entry.fixed.items()}
    dims = parse(entry.axes)
    used = {axis for dim in dims for axis in dim} | set(entry.fixed)
    for dim, size in zip(dims, shape, strict=True):
        if dim == ("v",):
            sizes["v"] = function["model.vocab_size"]
        elif len(dim) == 1:
            sizes[dim[0]] = size
        else:
            # Of a group, what is not known by its letter (or stands for half of it) is what is left.
            known = [axis for axis in dim if axis in ("h", "k", "two", "one")]
            open_axes = [axis for axis in dim if axis not in known]
            left = size // math.prod(sizes[axis] for axis in known)
            if len(open_axes) == 1:
                sizes[open_axes[0]] = left
    return {axis: size for axis, size in sizes.items() if axis in used}


def file_order(size: int, rotated: int) -> Values:
    """Where in a file each entry of an axis of ours lies, whose last ``rotated`` are pairs: there the two of a pair are
    neighbours, here one is in the first half and one in the second."""
    pairs = torch.arange(size - rotated, size).unflatten(0, (-1, 2))
    return torch.cat((torch.arange(size - rotated), pairs.T.flatten()))


def native_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of a resolved config, and of the biases that the choice sees, by name."""
    with torch.device("meta"):
        model = Transformer(config, range(config.model.num_layers + config.model.mtp_depth))
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    if has_selection_bias(config):
        for layer in sorted(moe_layers(config)):
            shapes[f"layers.{layer}.moe.router.bias"] = (config.moe.num_experts,)
    return shapes


def build_rows(family: Family, config: Config, always: Sequence[str] = ()) -> dict[str, Row]:
    """Rows of the table by our name: each of our tensors by exactly one entry, which may be open in block and expert.

    Args:
        config: resolved, with the vocabulary's size.
        always: names that get a row though the model has no such tensor (a bias of zeros).

    Raises:
        ValueError: a tensor of ours matches no entry, or more than one: the table is wrong.
    """
    function = function_of(config)
    shapes = native_shapes(config)
    if config.model.tie_embeddings:
        shapes.pop("output.weight", None)
    shapes |= {name: (config.moe.num_experts,) for name in always if name not in shapes}
    rows = {name: _row(family, function, name, shape) for name, shape in shapes.items()}
    return _stacked(family, rows)


def _row(family: Family, function: Function, name: str, shape: tuple[int, ...]) -> Row:
    block = re.match(r"layers\.(\d+)\.", name)
    short = name if block is None else f"layers.{{i}}.{name[block.end() :]}"
    entries = [entry for entry in family.tensors if entry.native == short]
    if len(entries) != 1:
        raise ValueError(f"{name} has {len(entries)} entries in the table of {family.model_type}; it needs one.")
    entry = entries[0]
    file = entry.file if block is None else entry.file.replace("{i}", block[1])
    return Row(entry, name, file, shape, axis_sizes(entry, shape, function), function["model.rope_dim"])


def _stacked(family: Family, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Rows that share a file tensor begin where the one before ends, in the order of the table."""
    order = {id(entry): number for number, entry in enumerate(family.tensors)}
    together: dict[str, list[Row]] = {}
    for row in rows.values():
        together.setdefault(row.file, []).append(row)
    placed: dict[str, Row] = {}
    for group in together.values():
        group.sort(key=lambda row: order[id(row.entry)])
        if len(group) > 1 and not any(row.entry.fixed for row in group):
            whole, start = sum(row.part_shape[0] for row in group), 0
            for number, row in enumerate(group):
                group[number] = replace(row, start=start, whole=whole)
                start += row.part_shape[0]
        placed |= {row.native: row for row in group}
    return {name: placed[name] for name in rows}


def file_shapes(rows: Mapping[str, Row]) -> dict[str, tuple[int, ...]]:
    """Shape of every file tensor that the rows speak of, in our order."""
    return {name: row.file_shape for row in rows.values() for name, _ in row.files()}


def copied(family: Family, config: Config, rows: Mapping[str, Row]) -> dict[str, str]:
    """File tensors that repeat another one, which multi-token prediction shares, by their name: the other's name."""
    blocks = range(config.model.num_layers, config.model.num_layers + config.model.mtp_depth)
    return {
        file.replace("{i}", str(block)): rows[native].file
        for block in blocks
        for native, file in family.copies.items()
        if native in rows
    }


def is_extra(name: str, family: Family, config: Config) -> bool:
    """Whether a file tensor may be left unused: a computed table, a module beyond the last block, a tied head."""
    block = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    if block and int(block[1]) >= config.model.num_layers:
        ahead = int(block[1]) < config.model.num_layers + config.model.mtp_depth
        return not ahead or name in [file.replace("{i}", block[1]) for file in family.copies.values()]
    if config.model.tie_embeddings and name == "lm_head.weight":
        return True
    return any(re.fullmatch(pattern, name) for pattern in (*EXTRAS, *family.extras))
