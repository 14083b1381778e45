"""Documents to one memory-mapped array of tokens, made once per user and shared by every rank. N tokens, B windows.

A packed file is raw little-endian ids. Documents of a plain corpus are each followed by the end token, and all of their
tokens are targets; ids are ``uint16`` where the vocabulary allows and ``uint32`` otherwise. Conversations end as their
template has it, with end tokens in between, and only some of their tokens are targets: each id, a ``uint32``, carries
marks that say so, in bits that no vocabulary reaches.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.files import cache_homes, make_private
from moe_dtensor.data.records import clean
from moe_dtensor.data.tokenizer import Tokenizer

FORMAT = "2"  # part of the cache's keys: raise it when packing changes
CHUNK_DOCUMENTS = 64
CHUNK_SIZE = 1_000_000

Document = str | bytes | np.ndarray

TRAINED = 1 << 31
"""The token is a target."""
FIRST = 1 << 30
"""A document begins with it."""
PADDING = 1 << 29
"""It is no document's."""
IDS = PADDING - 1
"""All bits of an id."""
MARKED = np.dtype("<u4")
"""Of marked ids."""


@dataclass(frozen=True)
class Packed:
    """A split as tokens."""

    tokens_N: np.ndarray
    """Read-only memory map, uint16 or uint32, shape (N)."""
    digest: str
    """Of the tokens."""
    documents: int
    """Documents in them."""
    bad: int = 0
    """Records that were skipped."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if it holds every id, else uint32; little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def take_chunk(documents: Iterator[Document]) -> list[Document]:
    """The next documents to tokenise together: 64, or fewer where they reach a million characters (ids)."""
    chunk: list[Document] = []
    size = 0
    for document in islice(documents, CHUNK_DOCUMENTS):
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_SIZE:
            break
    return chunk


def join_documents(documents: list[Document], tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    """Ids of some documents, each followed by the end token; empty ones are left out. Arrays are taken as ids."""
    arrays = encode_documents(documents, tokenizer)
    end = np.array([tokenizer.end_id], dtype)
    parts = [part for array in arrays if len(array) for part in (array, end)]
    return np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)


def encode_documents(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each document, without end token. Arrays are taken as ids."""
    texts = [clean(d) if isinstance(d, str) else d for d in documents if not isinstance(d, np.ndarray)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    return [check_ids(d if isinstance(d, np.ndarray) else next(encoded), tokenizer) for d in documents]


class Conversation(str):
    """The text of a conversation.

    ``spans``: characters that are trained on, (first, after the last) in order.
    """

    spans: Sequence[tuple[int, int]] = ()


def join_conversations(documents: list[Any], tokenizer: Any, dtype: np.dtype = MARKED) -> np.ndarray:
    """Marked ids ``(N)`` of some conversations, one after the other.

    A token counts as the assistant's if one of its characters is.
    """
    if tokenizer.vocab_size > IDS:
        raise ConfigError(
            f"data.corpus = 'conversations' has room for ids below {IDS:,}, not for {tokenizer.vocab_size:,}.",
            "Take another tokenizer.",
        )
    parts = [np.empty(0, dtype)]
    encoded = tokenizer.encode_with_places([str(d) for d in documents])
    for document, (ids_N, start_N, end_N) in zip(documents, encoded, strict=True):
        marked_N = ids_N.astype(dtype)
        marked_N[overlaps(start_N, end_N, document.spans)] |= TRAINED
        marked_N[:1] |= FIRST
        parts.append(marked_N)
    return np.concatenate(parts)


def overlaps(start_N: np.ndarray, end_N: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, by their first character and the one after their last, have one in some span; bool ``(N)``."""
    first, after = np.array(spans, np.int64).reshape(-1, 2).T
    span_N = np.searchsorted(after, start_N, side="right")
    within_N = span_N < len(spans)
    return within_N & (np.append(first, 0)[span_N] < np.maximum(end_N, start_N + 1))


def mark_documents(window_BS1: np.ndarray, end_id: int) -> np.ndarray:
    """The same for windows of plain documents: all tokens are targets, a document begins after an end token, and an
    end token after another fills up."""
    is_end = window_BS1 == end_id
    after_end = np.zeros_like(is_end)
    after_end[:, 1:] = is_end[:, :-1]
    padding = is_end & after_end
    return window_BS1.astype(np.int64) | np.where(padding, PADDING, TRAINED) | np.where(after_end, FIRST, 0)


def check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """``ids``, or a ConfigError where one is outside the vocabulary."""
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ConfigError(
            f"token ids must be in [0, {tokenizer.vocab_size}), the tokenizer's vocabulary; the corpus has "
            f"{ids.min()} to {ids.max()}.",
            "Set data.tokenizer to the tokenizer that made the ids.",
        )
    return ids


def write_tokens(
    file: IO[bytes], documents: Iterable[Document], tokenizer: Tokenizer, marked: bool = False
) -> tuple[str, int]:
    """Tokenise ``documents`` into ``file``, a chunk at a time; digest of what was written, number of documents.

    Args:
        marked: they are conversations, whose ids carry marks.
    """
    dtype, join = (MARKED, join_conversations) if marked else (token_dtype(tokenizer.vocab_size), join_documents)
    digest = hashlib.blake2b(f"{tokenizer.fingerprint()} {dtype}".encode(), digest_size=16)
    remaining, count = iter(documents), 0
    while chunk := take_chunk(remaining):
        raw = join(chunk, tokenizer, dtype).tobytes()
        digest.update(raw)
        file.write(raw)
        count += sum(len(document) > 0 for document in chunk)
    return digest.hexdigest(), count


def packed(corpus: Any, split: str) -> Packed:
    """The split as a memory map, tokenised at the first call on this machine and cached for later ones.

    The key is ``corpus.cache_key()`` where there is one (built-in corpora: the files' paths, sizes and times), else
    ``corpus.fingerprint()`` and the file the class is defined in.
    """
    tokenizer: Tokenizer = corpus.tokenizer
    marked: bool = getattr(corpus, "marked", False)
    parts = [FORMAT, corpus_key(corpus), split, tokenizer.fingerprint()]
    key = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    folder = cache_folder()
    data, meta = folder / f"{key}.bin", folder / f"{key}.json"
    if not meta.exists():
        with locked(folder / f"{key}.lock"):
            if not meta.exists():  # another rank may have made it while this one waited
                logging.getLogger(__name__).info("tokenising the %s split once, into %s", split, data)
                with replace_file(data) as file:
                    digest, documents = write_tokens(file, corpus.documents(split), tokenizer, marked)
                told = {"digest": digest, "documents": documents, "bad": getattr(corpus, "bad_records", 0)}
                with replace_file(meta) as file:  # last: its presence says that the tokens are whole
                    file.write(json.dumps({**told, "corpus": type(corpus).__name__, "split": split}).encode())
    told = json.loads(meta.read_text())
    dtype = MARKED if marked else token_dtype(tokenizer.vocab_size)
    # An empty file cannot be mapped.
    tokens_N = np.memmap(data, dtype=dtype, mode="r") if data.stat().st_size else np.empty(0, dtype)
    return Packed(tokens_N, told["digest"], told["documents"], told["bad"])


def corpus_key(corpus: Any) -> str:
    """What the cached tokens of a corpus depend on, beside the tokenizer."""
    if hasattr(corpus, "cache_key"):
        return corpus.cache_key()
    source = inspect.getsourcefile(type(corpus))
    stat = os.stat(source) if source else None
    written = f"{stat.st_size} {stat.st_mtime_ns}" if stat else ""
    return f"{type(corpus).__qualname__} {corpus.fingerprint()} {source} {written}"


def cache_folder() -> Path:
    """Where tokens are cached; made where it is missing.

    ``$XDG_CACHE_HOME/moe_dtensor`` (``~/.cache/moe_dtensor``), or where that cannot be written, one of this user in
    the temporary folder, which is everybody's: there it has to be this user's alone.

    Raises:
        ConfigError: neither can serve.
    """
    own, shared = cache_homes()
    problems = []
    if own is not None:
        try:
            own.mkdir(parents=True, exist_ok=True)
            if os.access(own, os.W_OK | os.X_OK):
                return own
            problems.append(f"{str(own)!r}: it may not be written")
        except OSError as error:
            problems.append(f"{str(own)!r}: {error.strerror}")
    try:
        make_private(shared)
        return shared
    except OSError as error:
        problems.append(f"{str(shared)!r}: {error.strerror}")
    raise ConfigError(
        f"tokens are cached in a folder, but none can be used: {'; '.join(problems)}.",
        "Set XDG_CACHE_HOME to a folder that can be written.",
    )


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes ``target``'s name when it is complete, and leaves nothing when writing fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that one rank of a machine tokenises and the others wait."""
    # Not through a link, and nothing is emptied: what is there may be anything.
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as file:
        # Without locks (some network file systems) several ranks do the same work; each replaces whole files.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
