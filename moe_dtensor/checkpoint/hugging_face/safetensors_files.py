"""The ``.safetensors`` files of a folder: one is read where it is needed and written tensor by tensor; all are one
mapping from name to tensor, opened lazily through their index.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header, the
tensors' bytes one after another. Read with plain reads, not mapped: mapped pages would count as this process's memory,
and a file cut short would end it with a signal.

Experts in MXFP4 are read as numbers: 32 four-bit floats share a power of two (OCP Microscaling Formats 1.0, section 5).
E experts, R rows of a matrix, G groups of 32 of its columns.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.config.errors import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 64 << 20
"""Most that is read at once where only some columns are kept."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7 (E2M1); the fourth bit is the sign."""
BIAS = 127
"""Of the shared exponent (E8M0)."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What gpt-oss adds to the name of a tensor for its codes ``(E, R, G, 16)``, two in a byte, and exponents
``(E, R, G)``."""


Read = Callable[[str, Sequence[tuple[int, int]]], Tensor]
"""Gives a part of a file tensor by its name."""


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """In the file."""
    size: int
    """Bytes."""


class SafetensorsFile:
    """An open file.

    Raises:
        ConfigError: it cannot be read, has no such header, or is shorter (or longer) than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.", "Fetch the file again.") from None
        self.entries = self._read_header()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def _read_header(self) -> dict[str, Entry]:
        total = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if total < 8 or length > total - 8:
            raise ConfigError(f"{self.path} is cut short: {total} bytes hold no header.", "Fetch the file again.")
        try:
            header = json.loads(os.pread(self._handle, length, 8))
            entries = {
                name: Entry(
                    value["dtype"],
                    tuple(value["shape"]),
                    8 + length + value["data_offsets"][0],
                    value["data_offsets"][1] - value["data_offsets"][0],
                )
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{self.path} is no .safetensors file.", "Fetch the file again.") from None
        end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
        if total != end:
            kind = "is cut short" if total < end else "is longer than its header says"
            raise ConfigError(f"{self.path} {kind}: {total} bytes instead of {end}.", "Fetch the file again.")
        for name, entry in entries.items():
            if entry.dtype in DTYPES and entry.size != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
                raise ConfigError(f"{self.path}: {name} has {entry.size} bytes for shape {list(entry.shape)}.")
        return entries

    def read(self, name: str, ranges: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """A tensor, or the part from ``start`` to ``stop`` along each dimension; contiguous."""
        entry = self.entries[name]
        ranges = list(ranges) if ranges is not None else [(0, size) for size in entry.shape]
        out = torch.empty([stop - start for start, stop in ranges], dtype=DTYPES[entry.dtype])
        if out.numel() == 0:
            return out
        if not ranges:
            self._read_into(out, entry.start)
            return out
        row = math.prod(entry.shape[1:]) * out.element_size()
        first, last = ranges[0]
        if all((0, size) == held for size, held in zip(entry.shape[1:], ranges[1:], strict=True)):
            self._read_into(out, entry.start + first * row)
            return out
        step = max(1, PIECE_BYTES // max(1, row))
        inner = tuple(slice(*held) for held in ranges[1:])
        for low in range(first, last, step):
            high = min(last, low + step)
            piece = torch.empty((high - low, *entry.shape[1:]), dtype=out.dtype)
            self._read_into(piece, entry.start + low * row)
            out[low - first : high - first].copy_(piece[(slice(None), *inner)])
        return out

    def _read_into(self, out: Tensor, offset: int) -> None:
        view = _bytes(out)
        done = 0
        while done < len(view):
            count = os.preadv(self._handle, [view[done:]], offset + done)
            if count == 0:
                raise ConfigError(f"{self.path} is cut short.", "Fetch the file again.")
            done += count


def write_file(
    path: Path,
    layout: Mapping[str, tuple[Sequence[int], torch.dtype]],
    values: Callable[[str], Tensor],
    done: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write tensors one by one, so that no more than one is held.

    Args:
        layout: name to shape and dtype, in the order of the file.
        values: gives a tensor when its turn comes.
        done: called with the bytes of each tensor written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in layout.items():
            value = values(name).to(dtype).contiguous()
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, planned was {tuple(shape)}.")
            file.write(_bytes(value))
            done(value.numel() * value.element_size())
        file.flush()
        os.fsync(file.fileno())


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return values.view(-1).view(torch.uint8).numpy().data


def total_bytes(layout: Iterable[tuple[Sequence[int], torch.dtype]]) -> int:
    """Of some tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)


class Shards:
    """The tensors of a Hugging Face folder.

    Raises:
        ConfigError: no weights, a shard that the index names is missing or cut short, an index entry without a tensor,
            or tensors that no index entry names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self.file_of = self._index()
        found: dict[str, str] = {}
        for file in sorted(set(self.file_of.values())):
            found |= dict.fromkeys(self._shard(file).entries, file)
        ghosts = [name for name in self.file_of if found.get(name) != self.file_of[name]]
        if ghosts:
            raise ConfigError(
                f"{self.folder / INDEX} names {some(ghosts)} in {self.file_of[ghosts[0]]}, which has no such tensor.",
                "Fetch index and shards again; they are not of one model.",
            )
        self.file_of = found
        self.packed = packed_tensors({name: self._shard(file).entries[name] for name, file in found.items()})
        """Experts in MXFP4, read as the numbers that they stand for."""

    def _index(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            try:
                return dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.folder / INDEX} is no index of shards.", "Fetch the file again.") from None
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._shard(SINGLE).entries, SINGLE)
        others = sorted(p.name for p in self.folder.glob("*.bin"))
        told = f" ({others[0]} is a pickle, which is not read)" if others else ""
        raise ConfigError(
            f"{self.folder} has neither {INDEX} nor {SINGLE}{told}.", "Give a folder with .safetensors weights."
        )

    def _shard(self, file: str) -> SafetensorsFile:
        if file not in self._open:
            if not (self.folder / file).is_file():
                raise ConfigError(
                    f"{self.folder / INDEX} names {file}, which is not there.", "Fetch the missing shard."
                )
            self._open[file] = SafetensorsFile(self.folder / file)
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of or name in self.packed

    def names(self) -> list[str]:
        """Of all tensors; packed ones without their parts."""
        parts = {base + part for base in self.packed for part in (BLOCKS, SCALES)}
        return [name for name in self.file_of if name not in parts] + list(self.packed)

    def entry(self, name: str) -> Entry:
        """Shape and dtype."""
        if name in self.packed:
            return self.packed[name]
        return self._shard(self.file_of[name]).entries[name]

    def read(self, name: str, ranges: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """A tensor or a part of it."""
        if name in self.packed:
            return read_packed(name, self.packed[name], ranges, self.read)
        return self._shard(self.file_of[name]).read(name, ranges)

    def refuse_quantized(self) -> None:
        """Raise for weights that are codes, not numbers: FP8 and other packed types, but for experts in MXFP4."""
        packed = [n for n in self.names() if n.endswith(("_blocks", "_scales", "weight_scale_inv", "weight_scale"))]
        odd = [n for n in self.names() if self.entry(n).dtype not in DTYPES or self.entry(n).dtype == "U8"]
        kind = "MXFP4" if any(n.endswith("_blocks") for n in packed) else "quantised"
        if odd:
            kind = "FP8" if self.entry(odd[0]).dtype.startswith("F8") else kind
        if packed or odd:
            name = (odd or packed)[0]
            raise ConfigError(
                f"{self.folder} holds {kind} weights ({name}, {self.entry(name).dtype}); they are not read as numbers.",
                "Dequantise the folder to bfloat16 first.",
            )


def packed_tensors(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What pairs of codes and exponents stand for, by name: matrices of experts in bfloat16, turned over,
    ``(E, 32 G, R)``, as gpt-oss has them unpacked."""
    found = {}
    for name, codes in entries.items():
        base = name.removesuffix(BLOCKS)
        exponents = entries.get(base + SCALES)
        if base == name or exponents is None or codes.dtype != "U8" or exponents.dtype != "U8":
            continue
        if codes.shape[-1] == 16 and codes.shape[:-1] == exponents.shape and len(codes.shape) == 4:
            experts, rows, groups, _ = codes.shape
            shape = (experts, 32 * groups, rows)
            found[base] = Entry("BF16", shape, 0, 2 * experts * 32 * groups * rows)
    return found


def read_packed(name: str, entry: Entry, ranges: Sequence[tuple[int, int]] | None, read: Read) -> Tensor:
    """A part of such a tensor, one expert at a time.

    Args:
        name: without what is added for codes and exponents.
        entry: see :func:`packed_tensors`.
        ranges: of experts, columns and rows; None: all.
        read: gives a part of a file tensor.
    """
    (first, last), (low, high), rows = ranges or [(0, size) for size in entry.shape]
    groups = (low // 32, -(-high // 32))
    out = torch.empty(last - first, high - low, rows[1] - rows[0], dtype=torch.bfloat16)
    for e in range(first, last):
        codes = read(name + BLOCKS, [(e, e + 1), rows, groups, (0, 16)])[0]
        exponents = read(name + SCALES, [(e, e + 1), rows, groups])[0]
        values_RC = unpack(codes, exponents)
        out[e - first].copy_(values_RC[:, low - 32 * groups[0] : high - 32 * groups[0]].T)
    return out


def unpack(codes_RGB: Tensor, exponent_RG: Tensor) -> Tensor:
    """``(R, G, 16)`` and ``(R, G)`` uint8 to ``(R, 32 G)`` float32; the lower half of a byte comes first."""
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    halves = torch.stack([codes_RGB & 15, codes_RGB >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[halves.long()], exponent_RG.int()[..., None] - BIAS)
    return values.flatten(-2)


def some(names: Sequence[str]) -> str:
    """The first three names and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
