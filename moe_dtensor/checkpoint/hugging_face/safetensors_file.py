"""One .safetensors file, read where it is needed and written tensor by tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header, the
tensors' bytes one after another. Read with plain reads, not mapped: mapped pages would count as this process's memory,
and a file cut short would end it with a signal.
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
