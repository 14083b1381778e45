"""Files of token ids: with our header, Megatron's pairs, NumPy arrays, raw ids; one or many as one array.

Megatron's index: the magic ``MMIDIDX\\0\\0``, version 1 (uint64), a code of the dtype (uint8), the numbers of sequences
and of document borders (uint64 each), the sequences' lengths (int32), their places in bytes (int64), and the borders
(int64, the first is 0), all little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError

MAGIC = b"MOETOKEN"
HEADER_BYTES = 1024
SUFFIX = ".tokens"
VERSION = 1
RAW_NAME = re.compile(r"\.(u?int(?:8|16|32|64))\.bin$")
SCAN_IDS = 1 << 20  # ids read at once when a file is looked through
OPEN_MAPS = 256  # maps held at once


@dataclass(frozen=True)
class Header:
    """What a token file says of itself."""

    dtype: str
    """NumPy's name, little-endian: ``<u2`` or ``<u4``."""
    tokens: int
    documents: int
    vocab_size: int
    end_id: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    checksum: str
    """blake2b-128 of the ids' bytes."""
    read: int = 0
    """Documents read for it, empty ones included: where the next file of the same corpus goes on."""
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """Magic, then JSON, filled up with spaces to ``HEADER_BYTES``; the last byte ends a line."""
        text = MAGIC + b" " + json.dumps(asdict(self)).encode()
        return text.ljust(HEADER_BYTES - 1) + b"\n"


@dataclass(frozen=True)
class TokenFile:
    """One file of ids."""

    path: str
    kind: str
    """tokens, megatron, npy, raw."""
    dtype: np.dtype
    tokens: int
    offset: int
    """Bytes before the first id."""
    documents: int | None = None
    """None: not known without reading all."""
    header: Header | None = None
    ends_D: np.ndarray | None = None
    """Where some documents end, if an index tells it: the token after each one's last."""

    def map(self) -> np.ndarray:
        """The ids as a read-only memory map."""
        if self.tokens == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


def read_header(path: str) -> Header:
    """The header of one of our token files; a ConfigError tells what does not fit."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    try:
        header = Header(**json.loads(raw.removeprefix(MAGIC)))
        itemsize = np.dtype(header.dtype).itemsize
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path!r} has a broken header ({error}).", "Write it again: the verb tokenize.") from error
    if header.version != VERSION:
        raise ConfigError(
            f"{path!r} is of version {header.version} of the token files; this program reads {VERSION}.",
            "Write it again: the verb tokenize.",
        )
    size = os.path.getsize(path) - HEADER_BYTES
    if size != header.tokens * itemsize:
        raise ConfigError(
            f"{path!r} must hold {header.tokens} ids of {itemsize} bytes, as its header says; it has {size} bytes.",
            "It was cut or changed: copy it again, or write it again with the verb tokenize.",
        )
    return header


def open_token_file(key: str, path: str) -> TokenFile:
    """One file of ids by its content; ``key`` names the path in errors."""
    with open(path, "rb") as file:
        head = file.read(len(MAGIC))
    if head == MAGIC:
        header = read_header(path)
        dtype = np.dtype(header.dtype)
        return TokenFile(path, "tokens", dtype, header.tokens, HEADER_BYTES, header.documents, header)
    if head.startswith(b"\x93NUMPY") or path.endswith(".npy"):
        return open_npy(key, path)
    if path.endswith(".bin"):
        pair = open_pair(path)
        if pair is not None:
            return TokenFile(path, "megatron", pair.dtype, pair.tokens, 0, pair.documents, ends_D=pair.ends)
        return open_raw(key, path)
    raise ConfigError(
        f"{key} must be a .npy or .bin file of token ids, a file of the verb tokenize, or a folder of them, for "
        f"data.corpus = 'tokens'; {path!r} is not.",
        f"Set {key} to such a file; docs/data.md shows how to make one.",
    )


def open_npy(key: str, path: str) -> TokenFile:
    """A one-dimensional integer array that numpy.save wrote."""
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"{key} = {path!r} is not a .npy file of numbers: {error}", "Write it with numpy.save."
        ) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"{key} = {path!r} must hold a one-dimensional integer array; it is {array.dtype} of shape {array.shape}.",
            "Save the ids of all documents, each followed by the end token, as one array.",
        )
    return TokenFile(path, "npy", array.dtype, len(array), getattr(array, "offset", 0))


def open_raw(key: str, path: str) -> TokenFile:
    """Raw little-endian ids: ``name.<dtype>.bin``, or 2-byte ids where the name tells no dtype."""
    named = RAW_NAME.search(path)
    dtype = np.dtype(named[1] if named else "uint16").newbyteorder("<")
    size = os.path.getsize(path)
    if size == 0 or size % dtype.itemsize:
        raise ConfigError(
            f"{key} = {path!r} must hold {dtype.name} ids, {dtype.itemsize} bytes each; it has {size} bytes.",
            "Name files of 4-byte ids *.uint32.bin; other .bin files hold 2-byte ids.",
        )
    file = TokenFile(path, "raw", dtype, size // dtype.itemsize, 0)
    if dtype.itemsize == 2:
        check_width(key, file)
    return file


def check_width(key: str, file: TokenFile) -> None:
    """ConfigError if 2-byte ids look like wider ones: every second one is 0, and others are not."""
    for start in sample_places(file.tokens):
        ids_N = read_at(file, start & ~1, 4096)
        odd, even = ids_N[1::2], ids_N[::2]
        if len(odd) < 8 or odd.any():
            return
        if even.any():
            raise ConfigError(
                f"{key} = {file.path!r} is read as 2-byte ids, but every second one is 0: it holds wider ids.",
                "Name it *.uint32.bin (or *.int32.bin, *.int64.bin), as its ids are; a Megatron .bin needs its .idx "
                "beside it.",
            )


def sample_places(tokens: int) -> list[int]:
    """Where to look into a file of so many ids: its start, then evenly."""
    return [0, *np.linspace(0, max(0, tokens - 4096), 16, dtype=np.int64).tolist()]


def read_at(file: TokenFile, start: int, count: int) -> np.ndarray:
    """Some ids, read without mapping them: what is looked through does not stay in memory."""
    count = max(0, min(count, file.tokens - start))
    return np.fromfile(file.path, file.dtype, count, offset=file.offset + start * file.dtype.itemsize)


class TokenFiles:
    """Many files as one array of ids, of which slices are read; files are mapped when first touched.

    Args:
        files: in their order.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = tuple(files)
        self.starts = [0, *accumulate(f.tokens for f in self.files)]
        kinds = {f.dtype for f in self.files}
        # Megatron may keep ids as floating-point numbers: they are whole.
        self.dtype = np.result_type(*kinds) if all(k.kind in "iu" for k in kinds) else np.dtype(np.int64)
        self._map = lru_cache(OPEN_MAPS)(lambda index: self.files[index].map())

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, asked: slice) -> np.ndarray:
        """The ids of a slice without step, copied together where they lie in several files."""
        start, stop, _ = asked.indices(len(self))
        parts = []
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            base, end = self.starts[index], min(self.starts[index + 1], stop)
            if end > start:
                parts.append(self._map(index)[start - base : end - base])
            start, index = max(start, end), index + 1
        if len(parts) == 1:
            return parts[0] if parts[0].dtype == self.dtype else parts[0].astype(self.dtype)
        return np.concatenate(parts).astype(self.dtype) if parts else np.empty(0, self.dtype)

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(place, ids) of all pieces of a range, read without mapping."""
        for index, file in enumerate(self.files):
            base = self.starts[index]
            place, end = max(start, base), min(stop, self.starts[index + 1])
            while place < end:
                ids_N = read_at(file, place - base, min(SCAN_IDS, end - place))
                yield place, ids_N
                place += len(ids_N)


class TokenRange:
    """A part ``[start, stop)`` of token files, as an array."""

    def __init__(self, whole: TokenFiles, start: int, stop: int) -> None:
        self.whole, self.start, self.stop, self.dtype = whole, start, stop, whole.dtype

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, asked: slice) -> np.ndarray:
        start, stop, _ = asked.indices(len(self))
        return self.whole[self.start + start : self.start + max(start, stop)]

    def array(self) -> np.ndarray | TokenRange:
        """The ids as one memory map where a single file has them, else this."""
        return self[:] if len(self.whole.files) == 1 else self

    def scan(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place, ids) of all pieces."""
        for place, ids_N in self.whole.scan(self.start, self.stop):
            yield place - self.start, ids_N


def verify_checksum(file: TokenFile) -> None:
    """ConfigError if the ids are not those that the header's checksum is of."""
    assert file.header is not None
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, file.tokens, SCAN_IDS):
        digest.update(read_at(file, start, SCAN_IDS).tobytes())
    if digest.hexdigest() != file.header.checksum:
        raise ConfigError(
            f"{file.path!r} has other ids than when it was written: their checksum differs.",
            "Copy it again, or write it again with the verb tokenize.",
        )


def token_file_name(folder: str | Path, split: str, number: int) -> Path:
    """Where shard ``number`` of a split lies."""
    return Path(folder) / split / f"{number:06d}{SUFFIX}"


MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
MEGATRON_FIXED = struct.Struct("<QBQQ")


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
        raw = file.read(len(MEGATRON_MAGIC) + MEGATRON_FIXED.size)
    if raw.startswith(b"TNTIDX"):
        raise ConfigError(
            f"{index!r} is an index of Megatron's old kind (TNTIDX), which is not read.",
            "Preprocess the data again with a present Megatron, or with the verb tokenize.",
        )
    if not raw.startswith(MEGATRON_MAGIC):
        return None
    if len(raw) < len(MEGATRON_MAGIC) + MEGATRON_FIXED.size:
        raise refused(index, "it ends within its header")
    version, code, sequences, borders = MEGATRON_FIXED.unpack(raw[len(MEGATRON_MAGIC) :])
    if version != 1 or code not in MEGATRON_DTYPES:
        raise refused(index, f"version {version} and dtype code {code} are not of the layout that is known")
    sizes_at = len(MEGATRON_MAGIC) + MEGATRON_FIXED.size
    needed = sizes_at + sequences * 12 + borders * 8
    if os.path.getsize(index) < needed:
        raise refused(index, f"it has {os.path.getsize(index)} bytes, and needs {needed} for what it counts")
    sizes = np.memmap(index, "<i4", "r", sizes_at, (sequences,)) if sequences else np.empty(0, "<i4")
    pointers_at = sizes_at + 4 * sequences
    pointers = np.memmap(index, "<i8", "r", pointers_at, (sequences,)) if sequences else np.empty(0, "<i8")
    edges = np.fromfile(index, "<i8", borders, offset=pointers_at + 8 * sequences)
    dtype = np.dtype(MEGATRON_DTYPES[code])
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
