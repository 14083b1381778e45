"""Corpora that are tokens already: memory-mapped files, and random ids for benchmarks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.files import check_apart, list_files
from moe_dtensor.data.pack import check_ids
from moe_dtensor.data.text import HELD_OUT
from moe_dtensor.data.token_files import (
    SUFFIX,
    TokenFile,
    TokenFiles,
    TokenRange,
    open_token_file,
    read_at,
    verify_checksum,
)
from moe_dtensor.data.tokenizer import Tokenizer

RANDOM_DOCUMENT = 4096  # tokens
SAMPLES = 64  # pieces of a token file that go into its fingerprint
SAMPLE_TOKENS = 1024
LOOKED_AT = 1 << 27  # ids of a file that are all looked at before training
LOOKED_AT_ONCE = 65536


class TokensCorpus:
    """Token ids in files, documents followed by the tokenizer's end token; read through memory maps.

    ``data.path`` is a file, a folder or a glob: files of the verb ``tokenize`` (with a header), Megatron's pairs of
    ``.bin`` and ``.idx``, one-dimensional ``.npy`` arrays, and raw little-endian ids named ``name.<dtype>.bin`` (any
    other ``.bin``: 2-byte ids). Without ``data.validation_path`` the last twentieth is held out, from the end of a
    document; a folder of ``tokenize`` has both splits.

    Raises:
        ConfigError: no such file, not of that form, not this tokenizer's ids, or files that contradict themselves.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer, data = tokenizer, config.data
        held_out = data.validation_path
        path = data.path
        if not held_out and has_both_splits(path):
            path, held_out = os.path.join(path, "train"), os.path.join(path, "validation")
        self.files, self.left_out = open_path("data.path", path)
        whole = TokenFiles(self.files)
        check_headers(self.files, tokenizer)
        if held_out:
            files, _ = open_path("data.validation_path", held_out)
            check_apart([f.path for f in self.files], [f.path for f in files])
            check_headers(files, tokenizer)
            validation = TokenFiles(files)
            self._splits = {
                "train": TokenRange(whole, 0, len(whole)),
                "validation": TokenRange(validation, 0, len(validation)),
            }
        else:
            cut = find_cut(whole, tokenizer.end_id)
            self._splits = {"train": TokenRange(whole, 0, cut), "validation": TokenRange(whole, cut, len(whole))}
        self.contents = {split: check_content(tokens, tokenizer) for split, tokens in self._splits.items()}
        if data.document_mask:
            check_ends(self.contents["train"], tokenizer.end_id, data.path)

    def token_array(self, split: str) -> np.ndarray | TokenRange:
        """The ids of a split, shape (N), end tokens included."""
        return self._splits[split].array()

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Ids of each document, without its end token."""
        tokens_N = self._splits[split]
        start = 0
        for place, ids_N in tokens_N.scan():
            for end in (np.flatnonzero(ids_N == self.tokenizer.end_id) + place).tolist():
                yield tokens_N[start:end]
                start = end + 1
        if start < len(tokens_N):
            yield tokens_N[start:]

    def fingerprint(self) -> str:
        """Digest of the number of training tokens and of samples of them, spread evenly."""
        tokens_N = self._splits["train"]
        digest = hashlib.blake2b(f"{len(tokens_N)} {self.tokenizer.fingerprint()}".encode(), digest_size=16)
        for start in np.linspace(0, max(0, len(tokens_N) - SAMPLE_TOKENS), SAMPLES, dtype=np.int64).tolist():
            digest.update(tokens_N[start : start + SAMPLE_TOKENS].astype("<i8").tobytes())
        return digest.hexdigest()


def find_cut(whole: TokenFiles, end_id: int) -> int:
    """Where validation starts: after the first end token in the last twentieth, else at the twentieth."""
    cut = len(whole) - len(whole) // HELD_OUT
    for place, ids_N in whole.scan(cut, len(whole)):
        found = np.flatnonzero(ids_N == end_id)
        if len(found):
            return place + int(found[0]) + 1
    return cut


def has_both_splits(path: str) -> bool:
    """Whether a path is a folder that the verb tokenize wrote."""
    folder = os.path.expanduser(path)
    return all(os.path.isdir(os.path.join(folder, split)) for split in ("train", "validation"))


def open_path(key: str, path: str) -> tuple[list[TokenFile], dict[str, str]]:
    """The token files behind a path, and why others beside them are left out."""
    pattern = os.path.expanduser(path)
    if pattern.endswith(".idx"):
        pattern = pattern[:-4] + ".bin"
    elif not os.path.exists(pattern) and os.path.isfile(pattern + ".bin"):
        pattern += ".bin"  # Megatron names a pair by what both names share
    names, opened, left_out = list_files(pattern), [], {}
    for name in names:
        if name.endswith(".idx") and name[:-4] + ".bin" in names:
            continue
        if os.path.isdir(pattern) and not name.endswith((".npy", ".bin", SUFFIX)):
            left_out[name] = "not token ids"
        else:
            opened.append(open_token_file(key, name))
    if not opened:
        raise ConfigError(
            f"{key} must be a .npy or .bin file of token ids, or a folder or a glob of them, for data.corpus = "
            f"'tokens'; {path!r} is not (from {os.getcwd()!r}).",
            f"Set {key} to such a file; docs/data.md shows how to make one.",
        )
    return opened, left_out


@dataclass(frozen=True)
class Content:
    """What was seen of a split's ids."""

    seen: int
    """Ids looked at; all of them, or samples of a large file."""
    ends: int
    """End tokens among them."""
    documents: int | None
    """None: too many ids to count."""
    closed: float | None
    """Share of the documents, where an index tells them, that the end token closes."""


def check_content(tokens: TokenRange, tokenizer: Tokenizer) -> Content:
    """Look through a split: every id up to ``LOOKED_AT`` of them, samples of more.

    Raises:
        ConfigError: an id outside the vocabulary.
    """
    if sum(f.tokens for f in tokens.whole.files) <= LOOKED_AT:
        pieces = (ids_N for _, ids_N in tokens.scan())
    else:
        places = np.linspace(0, max(0, len(tokens) - LOOKED_AT_ONCE), SAMPLES, dtype=np.int64).tolist()
        pieces = (
            ids_N for p in places for _, ids_N in tokens.whole.scan(tokens.start + p, tokens.start + p + LOOKED_AT_ONCE)
        )
    seen = ends = 0
    for ids_N in pieces:
        check_ids(ids_N, tokenizer)
        seen, ends = seen + len(ids_N), ends + int(np.count_nonzero(ids_N == tokenizer.end_id))
    documents = [file.documents for file in tokens.whole.files]
    known = sum(n for n in documents if n is not None) if None not in documents else None
    whole = tokens.start == 0 and tokens.stop == len(tokens.whole)
    counted = ends if seen == len(tokens) else None
    return Content(seen, ends, known if whole and known is not None else counted, closed_share(tokens, tokenizer))


def closed_share(tokens: TokenRange, tokenizer: Tokenizer) -> float | None:
    """Share of the documents of Megatron's pairs whose last id is the end token; None where no index tells them."""
    lasts = [
        read_at(file, int(end) - 1, 1)[0] == tokenizer.end_id
        for file in tokens.whole.files
        if file.ends_D is not None
        for end in file.ends_D[: max(1, SAMPLES // len(tokens.whole.files))]
    ]
    return sum(map(bool, lasts)) / len(lasts) if lasts else None


def check_headers(files: Sequence[TokenFile], tokenizer: Tokenizer) -> None:
    """ConfigError if a file of the verb tokenize is not of this tokenizer, or not as it was written.

    Checksums are compared of all files that hold ``LOOKED_AT`` ids together, of more files only of some spread ones.
    """
    written = [(file, file.header) for file in files if file.header]
    for file, header in written:
        if header.tokenizer != tokenizer.fingerprint() or header.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"{file.path!r} was written with another tokenizer than data.tokenizer: its vocabulary has "
                f"{header.vocab_size} ids and its digest is {header.tokenizer}; here {tokenizer.vocab_size} and "
                f"{tokenizer.fingerprint()}.",
                "Set data.tokenizer to the one that made the file.",
            )
    left = LOOKED_AT
    few = sum(file.tokens for file, _ in written) <= LOOKED_AT
    for file, _ in written if few else written[:: -(-len(written) // SAMPLES)]:
        if file.tokens <= left:
            verify_checksum(file)
            left -= file.tokens


def check_ends(content: Content, end_id: int, path: str) -> None:
    """ConfigError if documents are to be masked, but no end token tells them."""
    if content.ends == 0 or content.closed == 0:
        raise ConfigError(
            f"data.document_mask = true goes by end tokens (id {end_id}); {path!r} has none "
            + (f"among {content.seen} ids." if content.ends == 0 else "at the end of its documents."),
            "Set data.document_mask = false, or write the ids again with an end token after each document.",
        )


class RandomCorpus:
    """Synthetic: ids drawn uniformly from the vocabulary, in documents of 4096 tokens. For benchmarks only.

    The vocabulary is ``model.vocab_size``, or the tokenizer's where that is 0.
    """

    streaming = True

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        # No text passes through the tokenizer, so its vocabulary may be stretched to the model's.
        tokenizer.vocab_size = max(tokenizer.vocab_size, config.model.vocab_size)
        self.tokenizer, self.seed = tokenizer, config.training.seed

    def documents(self, split: str) -> RandomDocuments:
        """Endless arrays of ids."""
        return RandomDocuments(self.tokenizer.vocab_size, (self.seed, int(split == "validation")))

    def fingerprint(self) -> str:
        """Vocabulary and seed."""
        return f"random {self.tokenizer.vocab_size} {self.seed}"


class RandomDocuments:
    """Document i is drawn from (seed, i), so that its number is the whole position."""

    def __init__(self, vocab_size: int, seed: tuple[int, ...]) -> None:
        self.vocab_size, self.seed, self.index = vocab_size, seed, 0

    def __iter__(self) -> RandomDocuments:
        return self

    def __next__(self) -> np.ndarray:
        ids = np.random.default_rng((*self.seed, self.index)).integers(self.vocab_size, size=RANDOM_DOCUMENT)
        self.index += 1
        return ids

    def state_dict(self) -> int:
        """Documents drawn."""
        return self.index

    def load_state_dict(self, state: int) -> None:
        """Go to a document."""
        self.index = state
