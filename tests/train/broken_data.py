"""Kinds of broken data: each makes its files in a folder and gives the keys that lead to them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

Keys = dict[str, str]
RECORDS = [json.dumps({"text": f"a text of some words, number {i}, that a model may learn from"}) for i in range(200)]


def files(path: Path, content: bytes | str, **more: str) -> Keys:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return {"data.corpus": "files", "data.path": str(path), **more}


def lines(folder: Path, broken: str, corpus: str = "files") -> Keys:
    """Records of which one in the middle is broken."""
    return files(folder / "a.jsonl", "\n".join([*RECORDS[:100], broken, *RECORDS[100:]]) + "\n") | {
        "data.corpus": corpus
    }


def ids(folder: Path, name: str, content: np.ndarray | bytes) -> Keys:
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        np.save(folder / name, content)
    return {"data.corpus": "tokens", "data.path": str(folder / name)}


def empty_folder(folder: Path) -> Keys:
    (folder / "empty").mkdir()
    return {"data.corpus": "files", "data.path": str(folder / "empty")}


def dangling_link(folder: Path) -> Keys:
    os.symlink(folder / "gone", folder / "a.txt")
    return {"data.corpus": "files", "data.path": str(folder / "a.txt")}


def cut_gzip(folder: Path) -> Keys:
    return files(folder / "a.jsonl.gz", gzip.compress("\n".join(RECORDS).encode())[:-200])


def cut_parquet(folder: Path) -> Keys:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": RECORDS}), folder / "a.parquet")
    whole = (folder / "a.parquet").read_bytes()
    return files(folder / "a.parquet", whole[: len(whole) // 2])


def other_column(folder: Path) -> Keys:
    return files(folder / "a.csv", "number,words\n" + "".join(f"{i},some words\n" for i in range(300)))


def both_splits(folder: Path) -> Keys:
    keys = files(folder / "a.txt", "words of a text\n" * 200)
    return keys | {"data.validation_path": keys["data.path"], "training.validation_interval": "2"}


def tokenizer(folder: Path, content: str) -> Keys:
    (folder / "tokenizer.json").write_text(content)
    return files(folder / "a.txt", "words of a text\n" * 200) | {"data.tokenizer": str(folder / "tokenizer.json")}


def words_alone(folder: Path) -> Keys:
    """A tokenizer that has no end token."""
    model = {"type": "WordLevel", "vocab": {"words": 0, "of": 1, "[UNK]": 2}, "unk_token": "[UNK]"}
    return tokenizer(folder, json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def another_index(folder: Path) -> Keys:
    """Megatron's index of another file."""
    (folder / "a.idx").write_bytes(b"MMIDIDX\0\0" + b"\x01" + bytes(7) + b"\x08" + b"\xff" * 16)
    return ids(folder, "a.bin", np.arange(4000, dtype="<u2").tobytes())


def no_weights(folder: Path) -> Keys:
    (folder / "weights").mkdir()
    return {"checkpoint.initial": str(folder / "weights")}


BROKEN: dict[str, tuple[Callable[[Path], Keys], str]] = {
    "no such path": (lambda f: {"data.corpus": "files", "data.path": str(f / "none.txt")}, "matches no file"),
    "an empty folder": (empty_folder, "matches no file"),
    "an empty file": (lambda f: files(f / "a.txt", ""), "the split must fill one global batch"),
    "a dangling link": (dangling_link, "matches no file"),
    "too little text": (lambda f: files(f / "a.txt", "a few words\n"), "the split must fill one global batch"),
    "not text": (lambda f: files(f / "a.txt", bytes(range(256)) * 40), "matches no file of text"),
    "a broken line of JSON": (lambda f: lines(f, '{"text": "cut'), "a.jsonl:101"),
    "a record without the field": (lambda f: lines(f, '{"txt": "x"}'), "a.jsonl:101"),
    "a text that is null": (lambda f: lines(f, '{"text": null}'), "a.jsonl:101"),
    "a text that is a number": (lambda f: lines(f, '{"text": 3}'), "a.jsonl:101"),
    "a streamed record without text": (lambda f: lines(f, '{"text": null}', "datasets"), "a.jsonl:101"),
    "another column": (other_column, "data.text_key must name a column that holds text"),
    "a gzip file cut short": (cut_gzip, "cannot be read to its end"),
    "a parquet file cut short": (cut_parquet, "a.parquet"),
    "a path of two splits": (both_splits, "must hold out what data.path does not train on"),
    "ids that are fractions": (lambda f: ids(f, "a.npy", np.ones(4000)), "one-dimensional integer array"),
    "ids in a table": (lambda f: ids(f, "a.npy", np.ones((40, 100), "i8")), "one-dimensional integer array"),
    "an id beyond the vocabulary": (lambda f: ids(f, "a.npy", np.full(4000, 300)), "300"),
    "half an id": (lambda f: ids(f, "a.bin", bytes(4001)), "2 bytes each"),
    "another file's index": (another_index, "a.idx"),
    "no array": (lambda f: ids(f, "a.npy", b"text" * 1000), "is not a .npy file"),
    "a tokenizer cut short": (lambda f: tokenizer(f, '{"model": {'), "is not a Hugging Face tokenizer"),
    "a tokenizer of nothing": (
        lambda f: tokenizer(f, '{"model": {"type": "none"}}'),
        "is not a Hugging Face tokenizer",
    ),
    "a tokenizer without an end": (words_alone, "needs an end token"),
    "no weights to begin with": (no_weights, "checkpoint.initial"),
}
