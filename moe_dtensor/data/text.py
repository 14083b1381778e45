"""Corpora of text files: the Python standard library, and your own ``.txt`` and ``.jsonl`` files."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.pack import packed
from moe_dtensor.data.tokenizer import Tokenizer

HELD_OUT = 20  # one document in HELD_OUT is for validation
SPLITS = ("train", "validation")


def is_held_out(key: str | bytes) -> bool:
    """Whether the document with this key belongs to validation: a stable hash, about one in ``HELD_OUT``."""
    digest = hashlib.blake2b(key.encode() if isinstance(key, str) else key, digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


class StdlibCorpus:
    """The ``.py`` files of the running Python's standard library, one document each.

    Sorted by path relative to the library, whose hash decides the split; installed packages and the few files that
    are not UTF-8 (test data) are left out.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(find_sources(str(self.root), ""))
        if not self.files:
            raise ConfigError(
                f"data.corpus = 'stdlib' reads the .py files of this Python's standard library; {str(self.root)!r} has "
                "none.",
                "Set data.corpus = 'files' and data.path to text of your own.",
            )

    def documents(self, split: str) -> Iterator[str]:
        """Texts of the files of a split."""
        for name, _ in self.files:
            if is_held_out(name) == (split == "validation"):
                try:
                    yield (self.root / name).read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue

    def cache_key(self) -> str:
        """Place, names, sizes and times of the files."""
        return f"stdlib {self.root} {self.files}"

    def fingerprint(self) -> str:
        """Digest of the training tokens."""
        return packed(self, "train").digest


def find_sources(root: str, below: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(relative path, (size, time)) of the ``.py`` files under ``root/below``."""
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in ("site-packages", "dist-packages", "__pycache__"):
                    yield from find_sources(root, name)
            elif entry.name.endswith(".py") and entry.is_file():
                stat = entry.stat()
                yield name, (stat.st_size, stat.st_mtime_ns)


class FilesCorpus:
    """Text files: a ``.jsonl`` has a document in each line's ``data.text_key``, any other file is one document.

    Without ``data.validation_path`` about one document in 20, by hash of its text, is held out; where there are
    fewer than 20 files of plain text and nothing else, the last twentieth of each.

    Raises:
        ConfigError: nothing matches, not UTF-8, not JSON, or the text key is missing.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text_key = config.data.text_key
        self.files = match_files("data.path", config.data.path)
        validation = config.data.validation_path
        self.validation_files = match_files("data.validation_path", validation) if validation else []
        self.by_tail = len(self.files) < HELD_OUT and not any(f.endswith(".jsonl") for f in self.files)

    def documents(self, split: str) -> Iterator[str]:
        """Texts of the documents of a split."""
        if self.validation_files:
            for file in self.validation_files if split == "validation" else self.files:
                yield from read_documents(file, self.text_key)
            return
        for file in self.files:
            for text in read_documents(file, self.text_key):
                if self.by_tail:
                    cut = find_tail(text)
                    yield text[cut:] if split == "validation" else text[:cut]
                elif is_held_out(text) == (split == "validation"):
                    yield text

    def cache_key(self) -> str:
        """Places, sizes and times of the files."""
        stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in self.files + self.validation_files]
        return f"files {self.text_key} {stats} {len(self.validation_files)}"

    def fingerprint(self) -> str:
        """Digest of the training tokens: a folder that moved is the same data."""
        return packed(self, "train").digest


def find_tail(text: str) -> int:
    """Where the last twentieth of a text starts: after a line where there is one near enough."""
    cut = len(text) - len(text) // HELD_OUT
    line = text.find("\n", cut) + 1
    return line if 0 < line <= cut + (len(text) - cut) // 2 else cut


def match_files(key: str, path: str) -> list[str]:
    """Absolute paths of a file, of a folder's ``.txt`` and ``.jsonl`` files, or of what matches a glob; sorted."""
    pattern = os.path.expanduser(path)
    if os.path.isdir(pattern):
        found = [f for e in ("txt", "jsonl") for f in glob.glob(f"{glob.escape(pattern)}/**/*.{e}", recursive=True)]
    else:
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(os.path.abspath(f) for f in found if os.path.isfile(f))
    if not files:
        raise ConfigError(
            f"{key} must be a text file, a folder of .txt or .jsonl files, or a glob; {path!r} matches no file "
            f"(from {os.getcwd()!r}).",
            f"Set {key} to files that exist, such as 'texts/*.txt' or 'texts/**/*.jsonl'.",
        )
    return files


def read_documents(file: str, text_key: str) -> Iterator[str]:
    """The documents of one file."""
    try:
        if not file.endswith(".jsonl"):
            yield Path(file).read_text(encoding="utf-8")
            return
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield get_text(json.loads(line), text_key, f"{file}:{number}")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.path: text files must be UTF-8; {file!r} is not ({error}).",
            "Convert it, or leave it out of the glob.",
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"data.path: every line of a .jsonl file must be a JSON object; {file!r} has one that is not ({error}).",
            "Mend the line, or leave the file out of the glob.",
        ) from error


def get_text(record: object, text_key: str, place: str) -> str:
    """The text field of a record, or a ConfigError that names the fields there are."""
    if isinstance(record, dict) and isinstance(record.get(text_key), str):
        return record[text_key]
    texts = [k for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
    raise ConfigError(
        f"data.text_key must name a field that holds text; {place} has no text in {text_key!r}, but in {texts}.",
        "Set data.text_key to one of them.",
    )
