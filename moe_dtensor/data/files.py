"""Which files a path means, what is left out and why; and what each holds, told by its first bytes.

A file's name decides only between plain text, JSON and tables of text.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config

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


RUN_MARK = "run.json"
"""Marks the folder of a run, whose files are never documents."""
DATA_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".txt")
"""Of files of text in a folder only these are taken; the others (README.md, LICENSE) are rarely documents."""
TOKENS = ("npy", "tokens", "bin", "idx")


@dataclass(frozen=True)
class DataFiles:
    """The files behind a path."""

    taken: tuple[str, ...]
    """Absolute paths, sorted."""
    formats: dict[str, Format]
    left_out: dict[str, str]
    """Why a file was not taken, by absolute path."""

    def kinds(self) -> str:
        """How many of each format: ``3 jsonl, 1 jsonl, gzip``."""
        counts = Counter(str(self.formats[f]) for f in self.taken)
        return "; ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def find_files(key: str, path: str, own_folders: Iterable[str] = ()) -> DataFiles:
    """Files of text behind a file's name, a folder or a glob.

    Args:
        key: the key that names the path, for errors.
        path: as in the TOML.
        own_folders: what this program writes into (the run's folder); never read.

    Raises:
        ConfigError: nothing is left, or a file named by itself is not text.
    """
    pattern = os.path.expanduser(path)
    found = list_files(pattern)
    formats: dict[str, Format] = {}
    left_out: dict[str, str] = {}
    seen: dict[tuple[int, int], str] = {}
    owners = Owners(own_folders)
    for file in found:
        why = reason_against(file, pattern, owners, formats, seen)
        if why:
            left_out[file] = why
    taken = tuple(file for file in found if file not in left_out)
    if not taken:
        told = "; ".join(f"{os.path.basename(f)}: {why}" for f, why in list(left_out.items())[:5])
        raise ConfigError(
            f"{key} must be a text file, a folder of .txt or .jsonl files (or .json, .ndjson, .csv, .parquet, .arrow), "
            f"or a glob; {path!r} matches no file{' of text: ' + told if told else ''} (from {os.getcwd()!r}).",
            f"Set {key} to files that exist, such as 'texts/*.txt' or 'texts/**/*.jsonl'.",
        )
    return DataFiles(taken, formats, left_out)


def cache_homes() -> tuple[Path | None, Path]:
    """Where tokens are cached: ``$XDG_CACHE_HOME/moe_dtensor`` (``~/.cache/moe_dtensor``), else a temporary folder.

    The first is None for a user without a home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = None if home.startswith("~") else Path(home) / "moe_dtensor"
    return own, Path(tempfile.gettempdir()) / f"moe_dtensor-{os.getuid()}"


def own_folders(config: Config) -> tuple[str, ...]:
    """What this program writes into: never documents."""
    return (config.run.folder, *(str(folder) for folder in cache_homes() if folder is not None))


def list_files(pattern: str) -> list[str]:
    """Absolute paths of the files that a pattern means, sorted; a folder means all in it, at any depth."""
    if os.path.isdir(pattern):
        names = [os.path.join(d, name) for d, _, files in os.walk(pattern, followlinks=True) for name in files]
    else:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return sorted({os.path.abspath(f) for f in names if os.path.isfile(f)})


def reason_against(
    file: str,
    pattern: str,
    owners: Owners,
    formats: dict[str, Format],
    seen: dict[tuple[int, int], str],
) -> str:
    """Why a file is not taken; empty if it is. Notes its format, and the file itself in ``seen``."""
    in_folder = os.path.isdir(pattern)
    root = os.path.abspath(pattern) if in_folder else os.path.dirname(file)
    hidden = any(part.startswith(".") for part in Path(file).relative_to(root).parts)
    if in_folder and hidden:
        return "hidden"
    if owner := owners.find(file):
        return f"written by a run or its cache ({owner})"
    stat = os.stat(file)
    same = seen.setdefault((stat.st_dev, stat.st_ino), file)
    if same != file:
        return f"the same file as {os.path.basename(same)}"
    formats[file] = found = recognise(file)
    if found.kind == "empty":
        return "empty"
    if found.kind in TOKENS:
        return "token ids, which data.corpus = 'tokens' reads"
    if found.kind not in TEXTS:
        return "not text, nor a table of texts" + (f" ({found.compression})" if found.compression else "")
    if in_folder and found.kind == "text" and suffix(file) not in DATA_SUFFIXES:
        return "its name is not one of data; name it, or a glob that matches it, to take it"
    return ""


class Owners:
    """Finds the run that wrote a file.

    Args:
        folders: of runs, whether they exist or not; others are known by their mark.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        self._owned = {Path(os.path.realpath(folder)): True for folder in folders if folder}

    def find(self, file: str) -> str:
        """The folder of the run that holds the file; empty if none does."""
        for folder in Path(os.path.realpath(file)).parents:
            if folder not in self._owned:
                self._owned[folder] = is_run_folder(folder)
            if self._owned[folder]:
                return str(folder)
        return ""


def is_run_folder(folder: Path) -> bool:
    """Whether a folder bears the mark of a run."""
    try:
        return "run_id" in json.loads((folder / RUN_MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def check_apart(train: Iterable[str], validation: Iterable[str], name: str = "data") -> None:
    """ConfigError if a file is for training and for validation, by whatever name."""
    held_out = {os.path.realpath(f) for f in validation}
    inodes = {(os.stat(f).st_dev, os.stat(f).st_ino) for f in held_out}
    both = [f for f in train if os.path.realpath(f) in held_out or (os.stat(f).st_dev, os.stat(f).st_ino) in inodes]
    if both:
        raise ConfigError(
            f"{name}.validation_path must hold out what {name}.path does not train on; both match "
            f"{', '.join(both[:5])}{f' and {len(both) - 5} more' if len(both) > 5 else ''}.",
            f"Move the files out of {name}.path's folder or glob, or leave {name}.validation_path empty: then a part "
            "is held out.",
        )


def make_private(folder: Path) -> None:
    """Make a folder that only this user may read and write, or take one that is.

    Raises:
        OSError: it cannot be made; or what is there is a link, another user's, or open to others. Whoever can write
            into it could have this program read their tokens as its own.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(0, "it is no folder of its own but a link", str(folder))
    if found.st_uid != os.getuid():
        raise PermissionError(0, f"it belongs to user {found.st_uid}", str(folder))
    if found.st_mode & 0o022:
        raise PermissionError(0, f"others may write into it (mode {stat.S_IMODE(found.st_mode):o})", str(folder))
