"""A corpus to sharded token files: several processes tokenise, one writes; what was written stays when it is killed.

The bytes depend on the documents, the tokenizer and the size of a shard alone, not on processes or interruptions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.pack import Document, corpus_key, encode_documents, replace_file, take_chunk, token_dtype
from moe_dtensor.data.token_files import HEADER_BYTES, Header, read_header, token_file_name
from moe_dtensor.data.tokenizer import Tokenizer
from moe_dtensor.orphans import end_with_parent

INDEX = "index.json"
PLAN = "plan.json"
AHEAD = 4  # chunks under way for each process
_tokenizer: Tokenizer | None = None  # of a worker: inherited by the fork, since not every tokenizer can be sent


@dataclass
class Shard:
    """A token file being written.

    Args:
        path: its name when it is whole.
        tokenizer: of the ids.
    """

    path: Path
    tokenizer: Tokenizer
    tokens: int = 0
    documents: int = 0
    read: int = 0
    _file: IO[bytes] | None = None
    _digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    @property
    def partial(self) -> Path:
        """Its name while it is written."""
        return self.path.with_name(f".{self.path.name}.partial")

    def add(self, ids_N: np.ndarray) -> None:
        """Write a document and its end token; an empty one is only counted as read."""
        self.read += 1
        if not len(ids_N):
            return
        file = self._open()
        dtype = token_dtype(self.tokenizer.vocab_size)
        raw = ids_N.astype(dtype).tobytes() + np.array([self.tokenizer.end_id], dtype).tobytes()
        file.write(raw)
        self._digest.update(raw)
        self.tokens, self.documents = self.tokens + len(ids_N) + 1, self.documents + 1

    def close(self) -> None:
        """Write the header and give the file its name."""
        header = Header(
            token_dtype(self.tokenizer.vocab_size).str,
            self.tokens,
            self.documents,
            self.tokenizer.vocab_size,
            self.tokenizer.end_id,
            self.tokenizer.fingerprint(),
            self._digest.hexdigest(),
            self.read,
        )
        with self._open() as file:
            file.seek(0)
            file.write(header.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing of it."""
        if self._file is not None:
            self._file.close()
            self.partial.unlink(missing_ok=True)

    def _open(self) -> IO[bytes]:
        """The file, with room for a header, from its first document on."""
        if self._file is None:
            self._file = self.partial.open("wb")
            self._file.write(b" " * HEADER_BYTES)
        return self._file


@dataclass(frozen=True)
class Done:
    """How far the writing is."""

    split: str
    documents: int
    tokens: int
    made: int
    """Of the tokens those that this call made."""
    share: float | None
    """Of the split's input; None: unknown."""


def write_shards(
    corpus: Any, folder: Path, workers: int, shard_tokens: int, tell: Callable[[Done], None]
) -> dict[str, list[Header]]:
    """Tokenise both splits of a finite corpus into ``folder``; go on where an earlier call was stopped.

    Args:
        corpus: what :func:`moe_dtensor.data.build_corpus` returns.
        folder: gets ``train/000000.tokens`` and so on, ``validation/`` likewise, and ``index.json`` at last.
        workers: processes that tokenise; 1: this one.
        shard_tokens: a shard ends with the document that reaches so many.
        tell: called after each chunk.

    Returns:
        The headers of the shards of each split.

    Raises:
        ConfigError: the folder holds something else, or tokens of another corpus or tokenizer.
    """
    check_folder(folder, corpus, shard_tokens)
    written = {split: write_split(corpus, split, folder, workers, shard_tokens, tell) for split in SPLITS}
    index = {
        split: [
            {"file": f"{split}/{token_file_name(folder, split, n).name}", "tokens": h.tokens, "documents": h.documents}
            for n, h in enumerate(headers)
        ]
        for split, headers in written.items()
    }
    with replace_file(folder / INDEX) as file:
        file.write(json.dumps({"vocab_size": corpus.tokenizer.vocab_size, "splits": index}, indent=1).encode())
    return written


SPLITS = ("train", "validation")


def check_folder(folder: Path, corpus: Any, shard_tokens: int) -> None:
    """Note what the folder is for; a ConfigError if it is for something else."""
    key = hashlib.blake2b(corpus_key(corpus).encode(), digest_size=16).hexdigest()
    plan = {"corpus": key, "tokenizer": corpus.tokenizer.fingerprint(), "shard_tokens": shard_tokens}
    if (folder / PLAN).is_file():
        found = json.loads((folder / PLAN).read_text())
        changed = [name for name, value in plan.items() if found.get(name) != value]
        if changed:
            raise ConfigError(
                f"--output {str(folder)!r} holds tokens with another {' and '.join(changed)}.",
                "Name another folder, or delete this one.",
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--output {str(folder)!r} is not empty, and was not written by this verb.", "Name an empty or new folder."
        )
    else:
        with replace_file(folder / PLAN) as file:
            file.write(json.dumps(plan).encode())
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)


def write_split(
    corpus: Any, split: str, folder: Path, workers: int, shard_tokens: int, tell: Callable[[Done], None]
) -> list[Header]:
    """The shards of a split: those that are there, then the rest."""
    headers: list[Header] = []
    while (path := token_file_name(folder, split, len(headers))).is_file():
        headers.append(read_header(str(path)))
    if (folder / INDEX).is_file():
        return headers
    documents = iter(corpus.documents(split))
    skip = sum(header.read for header in headers)
    next(islice(documents, skip, skip), None)
    read, before = skip, sum(header.tokens for header in headers)
    made = 0
    shard = Shard(token_file_name(folder, split, len(headers)), corpus.tokenizer)
    try:
        for arrays in encode_all(documents, corpus.tokenizer, workers):
            for ids_N in arrays:
                shard.add(ids_N)
                if shard.tokens >= shard_tokens:
                    shard.close()
                    headers.append(read_header(str(shard.path)))
                    shard = Shard(token_file_name(folder, split, len(headers)), corpus.tokenizer)
            read, made = read + len(arrays), made + sum(len(ids_N) + 1 for ids_N in arrays if len(ids_N))
            tell(Done(split, read, before + made, made, getattr(corpus, "done", None)))
        if shard.tokens:
            shard.close()
            headers.append(read_header(str(shard.path)))
    except BaseException:
        shard.discard()
        raise
    return headers


def encode_all(documents: Iterator[Document], tokenizer: Tokenizer, workers: int) -> Iterator[list[np.ndarray]]:
    """Ids of the documents in their order, a chunk at a time."""
    if workers == 1:
        while chunk := take_chunk(documents):
            yield encode_documents(chunk, tokenizer)
        return
    global _tokenizer
    _tokenizer = tokenizer
    pending: deque[Future[list[np.ndarray]]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), end_with_parent) as pool:
        try:
            while True:
                while len(pending) < AHEAD * workers and (chunk := take_chunk(documents)):
                    pending.append(pool.submit(_encode, chunk))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _encode(chunk: list[Document]) -> list[np.ndarray]:
    """In a worker."""
    assert _tokenizer is not None
    return encode_documents(chunk, _tokenizer)
