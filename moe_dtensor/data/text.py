"""Documents of text files: the Python standard library's, and your own, as a corpus or one after the other."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.files import DataFiles, check_apart, find_files, own_folders
from moe_dtensor.data.pack import packed
from moe_dtensor.data.records import BadRecords, Record, read_records
from moe_dtensor.data.tokenizer import Tokenizer

HELD_OUT = 20  # one document in HELD_OUT is for validation


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
    """Files of text by their content: each line of JSON lines, each row of a table, any other file as a whole.

    Without ``data.validation_path`` about one document in 20, by hash of its text, is held out; where there are
    fewer than 20 files of plain text and nothing else, the last twentieth of each.

    Raises:
        ConfigError: nothing matches, a file is for training and validation, or more records than
            ``data.max_bad_records`` allows are no documents.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text_key, self.max_bad = config.data.text_key, config.data.max_bad_records
        own = own_folders(config)
        self.files = find_files("data.path", config.data.path, own)
        validation = config.data.validation_path
        self.validation_files = find_files("data.validation_path", validation, own) if validation else None
        if self.validation_files:
            check_apart(self.files.taken, self.validation_files.taken)
        self.done: float | None = None
        """Share of the files' bytes that the latest pass has read."""
        self.by_tail = len(self.files.taken) < HELD_OUT and all(f.kind == "text" for f in self.files.formats.values())

    def documents(self, split: str) -> Iterator[str]:
        """Texts of the documents of a split."""
        if self.validation_files:
            yield from self._read(self.validation_files if split == "validation" else self.files)
            return
        for text in self._read(self.files):
            if self.by_tail:
                cut = find_tail(text)
                yield text[cut:] if split == "validation" else text[:cut]
            elif is_held_out(text) == (split == "validation"):
                yield text

    def _read(self, files: DataFiles) -> Iterator[str]:
        """Every document of some files."""
        bad = BadRecords(self.max_bad)
        self.bad_records = 0
        sizes = [os.path.getsize(file) for file in files.taken]
        for number, file in enumerate(files.taken):
            self.done = sum(sizes[:number]) / max(1, sum(sizes))
            for record in read_records(file, files.formats[file], self.text_key):
                if record.after:
                    self.done = (sum(sizes[:number]) + record.after) / max(1, sum(sizes))
                text = bad.take(self.judge(record), file)
                if text is not None:
                    yield text
        bad.judge()
        self.bad_records = bad.count

    def judge(self, record: Record) -> Record:
        """What becomes of a record: itself."""
        return record

    def cache_key(self) -> str:
        """Places, sizes and times of the files."""
        held_out = self.validation_files.taken if self.validation_files else ()
        stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in self.files.taken + held_out]
        return f"files {self.text_key} {stats} {len(held_out)} {self.max_bad}"

    def fingerprint(self) -> str:
        """Digest of the training tokens: a folder that moved is the same data."""
        return packed(self, "train").digest


def find_tail(text: str) -> int:
    """Where the last twentieth of a text starts: after a line where there is one near enough."""
    cut = len(text) - len(text) // HELD_OUT
    line = text.find("\n", cut) + 1
    return line if 0 < line <= cut + (len(text) - cut) // 2 else cut


class FileDocuments:
    """Iterator over the texts of local files, resumable.

    Args:
        files: read in their order.
        text_key: field of the text.
        split: ``train`` or ``validation`` to pick by hash; None takes all.
        max_bad: share of records that may be skipped.
    """

    def __init__(self, files: DataFiles, text_key: str, split: str | None, max_bad: float) -> None:
        self.files, self.text_key, self.split, self.max_bad = files, text_key, split, max_bad
        self.bad = BadRecords(max_bad)
        self._file = self._row = self._offset = 0
        self._texts: Iterator[str] | None = None

    def __iter__(self) -> FileDocuments:
        return self

    def __next__(self) -> str:
        if self._texts is None:
            self._texts = self._read()
        return next(self._texts)

    def _read(self) -> Iterator[str]:
        while self._file < len(self.files.taken):
            path = self.files.taken[self._file]
            for record in read_records(path, self.files.formats[path], self.text_key, self._row, self._offset):
                self._row, self._offset = record.row, record.after
                text = self.bad.take(record, path)
                if text is not None and (self.split is None or is_held_out(text) == (self.split == "validation")):
                    yield text
            self._file, self._row, self._offset = self._file + 1, 0, 0
        self.bad.judge()

    def state_dict(self) -> Any:
        """File, record and byte after the latest text; None before the first."""
        if self._texts is None and not (self._file or self._row):
            return None
        state = {"file": self._file, "row": self._row, "offset": self._offset}
        return state | ({"bad": self.bad.count, "read": self.bad.read} if self.max_bad else {})

    def load_state_dict(self, state: Any) -> None:
        """Continue there. Call before the first record is read."""
        if state is None:
            return
        if "file" not in state:
            self._skip(records_read(state))
            return
        self._file, self._row, self._offset = state["file"], state["row"], state["offset"]
        self.bad.count, self.bad.read = state.get("bad", 0), state.get("read", 0)

    def _skip(self, records: int) -> None:
        """Pass over records from the start: what an older checkpoint knows of its place."""
        texts, read = self._read_all(), 0
        while read < records and next(texts, None) is not None:
            read += 1

    def _read_all(self) -> Iterator[Record]:
        while self._file < len(self.files.taken):
            path = self.files.taken[self._file]
            for record in read_records(path, self.files.formats[path], self.text_key):
                self._row, self._offset = record.row, record.after
                yield record
            self._file, self._row, self._offset = self._file + 1, 0, 0


def records_read(state: Any) -> int:
    """Records that a position written by the datasets library counts."""
    inner = state.get("examples_iterable", {}) if isinstance(state, dict) else {}
    if "batch_idx" not in inner:
        raise ConfigError(
            "the checkpoint's place in the data was written by a release of the datasets library that is not known.",
            "Start over with --run.fresh true, or resume with the version of this program that wrote it.",
        )
    return inner["batch_idx"]
