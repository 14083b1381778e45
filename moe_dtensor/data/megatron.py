"""Megatron's indexed datasets: ``name.bin`` holds ids, ``name.idx`` their dtype, sequences and documents.

The index: the magic ``MMIDIDX\\0\\0``, version 1 (uint64), a code of the dtype (uint8), the numbers of sequences and of
document borders (uint64 each), the sequences' lengths (int32), their places in bytes (int64), and the borders (int64,
the first is 0), all little-endian.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

from moe_dtensor.config.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
FIXED = struct.Struct("<QBQQ")


@dataclass(frozen=True)
class Pair:
    """What an index tells of the ids beside it."""

    dtype: np.dtype
    tokens: int
    documents: int
    ends: np.ndarray
    """Token after a document's last, for about a thousand of them."""


def index_of(path: str) -> str:
    """The ``.idx`` of a ``.bin``."""
    return os.path.splitext(path)[0] + ".idx"


def open_pair(path: str) -> Pair | None:
    """The pair that a ``.bin`` belongs to; None if no Megatron index lies beside it.

    Raises:
        ConfigError: index and ids contradict each other, or the index is of another version.
    """
    index = index_of(path)
    if not os.path.isfile(index):
        return None
    with open(index, "rb") as file:
        raw = file.read(len(MAGIC) + FIXED.size)
    if raw.startswith(b"TNTIDX"):
        raise ConfigError(
            f"{index!r} is an index of Megatron's old kind (TNTIDX), which is not read.",
            "Preprocess the data again with a present Megatron, or with the verb tokenize.",
        )
    if not raw.startswith(MAGIC):
        return None
    if len(raw) < len(MAGIC) + FIXED.size:
        raise refused(index, "it ends within its header")
    version, code, sequences, borders = FIXED.unpack(raw[len(MAGIC) :])
    if version != 1 or code not in DTYPES:
        raise refused(index, f"version {version} and dtype code {code} are not of the layout that is known")
    sizes_at = len(MAGIC) + FIXED.size
    needed = sizes_at + sequences * 12 + borders * 8
    if os.path.getsize(index) < needed:
        raise refused(index, f"it has {os.path.getsize(index)} bytes, and needs {needed} for what it counts")
    sizes = np.memmap(index, "<i4", "r", sizes_at, (sequences,)) if sequences else np.empty(0, "<i4")
    pointers_at = sizes_at + 4 * sequences
    pointers = np.memmap(index, "<i8", "r", pointers_at, (sequences,)) if sequences else np.empty(0, "<i8")
    edges = np.fromfile(index, "<i8", borders, offset=pointers_at + 8 * sequences)
    dtype = np.dtype(DTYPES[code])
    after_N = np.cumsum(sizes, dtype=np.int64)
    tokens = int(after_N[-1]) if sequences else 0
    if os.path.getsize(path) != tokens * dtype.itemsize:
        raise refused(
            index,
            f"it counts {tokens} ids of {dtype.itemsize} bytes, but {os.path.basename(path)} has "
            f"{os.path.getsize(path)} bytes",
        )
    if not np.array_equal(pointers, (after_N - sizes) * dtype.itemsize):
        raise refused(index, "its sequences do not follow one another in the .bin")
    if borders and (edges[0] != 0 or edges[-1] != sequences or (np.diff(edges) < 0).any()):
        raise refused(index, "its documents' borders are not those of its sequences")
    ends = after_N[edges[1:][edges[1:] > 0] - 1] if borders > 1 else after_N
    # A copy: a view would keep the whole.
    return Pair(dtype, tokens, len(ends), ends[:: max(1, len(ends) // 1024)].copy())


def refused(index: str, why: str) -> ConfigError:
    """What is told of an index that cannot be right."""
    return ConfigError(
        f"{index!r} does not fit the ids beside it: {why}.", "Copy both files again; they belong together."
    )
