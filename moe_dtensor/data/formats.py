"""What a file holds, told by its first bytes; its name decides only between plain text, JSON and tables of text."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from moe_dtensor.config.errors import ConfigError

HEAD_BYTES = 65536
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream, as the datasets library saves it
    b"\x93NUMPY": "npy",
    b"MOETOKEN": "tokens",
    b"MMIDIDX\x00\x00": "idx",
}
TEXTS = ("text", "jsonl", "json", "csv", "parquet", "arrow")
"""Kinds that hold documents as text."""


@dataclass(frozen=True)
class Format:
    """What a file is."""

    kind: str
    """text, jsonl, json, csv, parquet, arrow; npy, tokens, idx, bin; or empty, unknown."""
    compression: str = ""
    """gzip, zstd, xz, or nothing."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.compression}" if self.compression else self.kind


def suffix(path: str | Path) -> str:
    """The ending of a name in small letters, without that of a compression: ``a.JSONL.gz`` has ``.jsonl``."""
    name = os.path.basename(path).lower()
    stem, last = os.path.splitext(name)
    return os.path.splitext(stem)[1] if last in SUFFIXES else last


def recognise(path: str | Path) -> Format:
    """The format of a file, by content.

    Raises:
        ConfigError: it cannot be read, or its compression is broken.
    """
    with open(path, "rb") as file:
        first = file.read(16)
    compression = next((name for magic, name in COMPRESSIONS.items() if first.startswith(magic)), "")
    with open_bytes(path, compression) as opened:
        head = read_whole(opened, HEAD_BYTES, path)
    if not head:
        return Format("empty", compression)
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")
    if kind:
        # Tables and token files are read at places, which a compressed file has not.
        return Format(kind if not compression else "unknown", compression)
    if suffix(path) == ".bin":
        return Format("bin" if not compression else "unknown", compression)
    return Format(text_kind(head, suffix(path)), compression)


def text_kind(head: bytes, ending: str) -> str:
    """jsonl, json, csv or text for the start of a file without a magic number; unknown where it is no text."""
    if b"\x00" in head:
        return "unknown"
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    whole = lines if len(head) < HEAD_BYTES or len(lines) == 1 else lines[:-1]
    if ending in JSON_SUFFIXES:
        if ending != ".json":
            return "jsonl"
        return "jsonl" if whole and is_object(whole[0]) else "json"
    if len(whole) > 1 and all(is_object(line) for line in whole[:5]):
        return "jsonl"
    return "csv" if ending in TABLE_SUFFIXES else "text"


def is_object(line: bytes) -> bool:
    """Whether a line is a JSON object."""
    try:
        return line.lstrip().startswith(b"{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def open_bytes(path: str | Path, compression: str) -> IO[bytes]:
    """The uncompressed bytes of a file, as a stream."""
    if compression == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == "xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if compression == "zstd":
        import io

        import pyarrow

        # Buffered, so that it has lines.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return open(path, "rb")


def read_whole(file: IO[bytes], count: int, path: str | Path) -> bytes:
    """The next ``count`` bytes, fewer at the end; a broken compression is a ConfigError that names the file."""
    parts: list[bytes] = []
    try:
        while count > 0 and (part := file.read(min(count, 1 << 26))):
            parts.append(part)
            count -= len(part)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise broken(path, error) from error
    return b"".join(parts)


def broken(path: str | Path, error: Exception) -> ConfigError:
    """What is told of a file that ends early or whose bytes are damaged."""
    return ConfigError(
        f"{os.fspath(path)!r} cannot be read to its end ({type(error).__name__}: {error}).",
        "Copy the file again, or leave it out of data.path.",
    )
