"""Documents of a file one after the other, and what becomes of records that are none."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import lzma
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.files import Format, broken, open_bytes, read_whole, suffix

SHOWN = 5  # bad records that are told with their place
TRIAL = 1000  # records before the share of bad ones is judged
WHOLE = ""
"""Instead of the field of the text: the whole record, as JSON."""


@dataclass(frozen=True)
class Record:
    """A record of a file: its text, or why it has none."""

    text: str | None
    row: int
    """Line of a text file, else number of the record; from 1."""
    why: str = ""
    after: int = 0
    """Byte after it, where the file can be opened there; else 0."""


@dataclass
class BadRecords:
    """Counts records that hold no text, and ends the run when they are more than ``share`` of all.

    Args:
        share: ``data.max_bad_records``; 0 refuses the first one.
    """

    share: float
    count: int = 0
    read: int = 0
    shown: list[str] = field(default_factory=list)

    def take(self, record: Record, place: str) -> str | None:
        """The record's text; None for a bad one that may be skipped.

        Raises:
            ConfigError: it is bad, and ``share`` does not allow it.
        """
        self.read += 1
        if record.text is not None:
            return record.text
        self.count += 1
        told = f"{place}:{record.row}: {record.why}"
        if self.share == 0:
            raise ConfigError(
                f"data.path has a record that is no document: {told}.",
                "Mend it, leave its file out, or set data.max_bad_records to the share of records that may be skipped.",
            )
        if len(self.shown) < SHOWN:
            self.shown.append(told)
            logging.getLogger(__name__).warning("skipped a bad record: %s", told)
        if self.read >= TRIAL:
            self.judge()
        return None

    def judge(self) -> None:
        """Raise if too many of what was read was bad; call at the end."""
        if self.count > self.share * self.read:
            raise ConfigError(
                f"data.max_bad_records = {self.share} allows that share of bad records; {self.count} of {self.read} "
                f"are bad, the first: {'; '.join(self.shown)}.",
                "Mend them, or raise data.max_bad_records.",
            )


def read_records(path: str, form: Format, text_key: str, skip: int = 0, offset: int = 0) -> Iterator[Record]:
    """The records of a file after the first ``skip``.

    Args:
        path: a file of text (``files.TEXTS``).
        form: what :func:`moe_dtensor.data.files.recognise` told.
        text_key: field of the text; not used for plain text. ``WHOLE``: all fields, as JSON.
        skip: records (for text files: lines) to pass over.
        offset: byte at which record ``skip + 1`` starts, if known.

    Raises:
        ConfigError: the file ends early, is damaged, or has no such column.
    """
    try:
        if form.kind in ("parquet", "arrow"):
            yield from read_columns(path, form.kind, text_key, skip)
            return
        with open_bytes(path, form.compression) as file:
            if form.kind == "jsonl":
                yield from read_lines(file, text_key, skip, 0 if form.compression else offset, not form.compression)
            elif skip == 0 or form.kind != "text":
                read = {"text": read_text, "json": read_json, "csv": read_table}[form.kind]
                yield from (record for number, record in enumerate(read(file, path, text_key)) if number >= skip)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise broken(path, error) from error


def read_text(file: IO[bytes], path: str, text_key: str) -> Iterator[Record]:
    """The whole file, with line ends as ``\\n``."""
    try:
        text = read_whole(file, sys.maxsize, path).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Record(None, 1, f"text files must be UTF-8, this one is not ({error})")
        return
    yield Record(text.replace("\r\n", "\n").replace("\r", "\n"), 1)


def read_lines(file: IO[bytes], text_key: str, skip: int, offset: int, seekable: bool) -> Iterator[Record]:
    """A JSON object in each line that is not blank."""
    number = 0
    if offset:
        file.seek(offset)
        number = skip
    for line in file:
        number += 1
        offset += len(line)
        if number <= skip or not line.strip():
            continue
        text, why = parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, text_key)
        yield Record(text, number, why, offset if seekable else 0)


def parse(line: bytes, text_key: str) -> tuple[str | None, str]:
    """The text of a line, or why there is none."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"the line is not UTF-8 ({error})"
    except ValueError as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return None, f"the line is no JSON object ({told}{column})"
    return find_text(record, text_key)


def read_json(file: IO[bytes], path: str, text_key: str) -> Iterator[Record]:
    """One object, or a list of them."""
    try:
        content = json.loads(read_whole(file, sys.maxsize, path).decode("utf-8-sig"))
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        yield Record(None, line, f"the file is not JSON ({error})")
        return
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        text, why = find_text(record, text_key)
        yield Record(text, number, why)


def read_table(file: IO[bytes], path: str, text_key: str) -> Iterator[Record]:
    """The column ``text_key`` of a table whose first line has the names; rows are counted below it."""
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    try:
        table = csv.DictReader(lines, delimiter="\t" if suffix(path) == ".tsv" else ",")
        check_column(path, text_key, list(table.fieldnames or []))
        for number in itertools.count(1):
            try:
                row = next(table, None)
            except csv.Error as error:
                yield Record(None, number, f"the row cannot be read ({error})")
                continue
            if row is None:
                return
            text = row[text_key] if text_key != WHOLE else find_text(row, text_key)[0]
            yield Record(clean(text), number) if text else Record(None, number, f"the cell {text_key!r} is empty")
    finally:
        lines.detach()  # the file is closed by who opened it


def read_columns(path: str, kind: str, text_key: str, skip: int) -> Iterator[Record]:
    """The column ``text_key`` of a parquet or arrow file."""
    import pyarrow

    number = 0
    try:
        for batch in open_batches(path, kind, text_key):
            if number + batch.num_rows <= skip:
                number += batch.num_rows
                continue
            rows = (
                batch.to_pylist() if text_key == WHOLE else [{text_key: v} for v in batch.column(text_key).to_pylist()]
            )
            for row in rows:
                number += 1
                if number > skip:
                    text, why = find_text(row, text_key)
                    yield Record(text, number, why)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise broken(path, error) from error


def open_batches(path: str, kind: str, text_key: str) -> Iterator[Any]:
    """Record batches that have the column."""
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as table:
            check_column(path, text_key, table.schema_arrow.names)
            yield from table.iter_batches(1024, columns=None if text_key == WHOLE else [text_key])
        return
    with pyarrow.memory_map(path) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            reader = batches = pyarrow.ipc.open_stream(source)
        check_column(path, text_key, reader.schema.names)
        yield from batches


def check_column(path: str, text_key: str, names: list[str]) -> None:
    """ConfigError if a table has no column of that name."""
    if text_key not in names and text_key != WHOLE:
        raise ConfigError(
            f"data.text_key must name a column that holds text; {path!r} has no {text_key!r}, but {names}.",
            "Set data.text_key to one of them.",
        )


def find_text(record: object, text_key: str) -> tuple[str | None, str]:
    """The text field of a record; or None, and what the record has instead."""
    if not isinstance(record, dict):
        with_key = f" with data.text_key = {text_key!r}" if text_key != WHOLE else ""
        return None, f"the record is {type(record).__name__}, not an object{with_key}"
    if text_key == WHOLE:
        return clean(json.dumps(record, ensure_ascii=False, default=str)), ""
    value = record.get(text_key)
    if isinstance(value, str):
        return clean(value), ""
    if text_key in record:
        return None, f"data.text_key = {text_key!r} holds {'null' if value is None else type(value).__name__}, no text"
    texts = [key for key, value in record.items() if isinstance(value, str)]
    return None, f"data.text_key = {text_key!r} is not in the record, which has text in {texts}"


def clean(text: str) -> str:
    """``text`` with every lone surrogate, which no encoding takes, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
