"""Corpora that are tokens already: a memory-mapped file, and random ids for benchmarks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.text import HELD_OUT
from moe_dtensor.data.tokenizer import Tokenizer

RANDOM_DOCUMENT = 4096  # tokens
SAMPLES = 64  # pieces of a token file that go into its fingerprint
SAMPLE_TOKENS = 1024


class TokensCorpus:
    """Token ids in a file, documents followed by the tokenizer's end token; read through a memory map.

    ``.npy``: a one-dimensional integer array. ``.uint32.bin``: raw little-endian uint32. Any other ``.bin``: raw
    little-endian uint16. Without ``data.validation_path`` the last twentieth is held out, from the end of a document.

    Raises:
        ConfigError: no such file, or not of that form.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokens_N = map_tokens("data.path", config.data.path)
        if config.data.validation_path:
            validation_N = map_tokens("data.validation_path", config.data.validation_path)
        else:
            cut = find_cut(tokens_N, tokenizer.end_id)
            tokens_N, validation_N = tokens_N[:cut], tokens_N[cut:]
        self._splits = {"train": tokens_N, "validation": validation_N}

    def token_array(self, split: str) -> np.ndarray:
        """The ids of a split, shape (N), end tokens included."""
        return self._splits[split]

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Ids of each document, without its end token."""
        tokens_N = self._splits[split]
        start = 0
        for end in np.flatnonzero(tokens_N == self.tokenizer.end_id).tolist():
            yield tokens_N[start:end]
            start = end + 1
        if start < len(tokens_N):
            yield tokens_N[start:]

    def fingerprint(self) -> str:
        """Digest of the number of training tokens and of samples of them, spread evenly."""
        tokens_N = self._splits["train"]
        digest = hashlib.blake2b(f"{len(tokens_N)} {self.tokenizer.fingerprint()}".encode(), digest_size=16)
        for start in np.linspace(0, max(0, len(tokens_N) - SAMPLE_TOKENS), SAMPLES, dtype=np.int64):
            digest.update(tokens_N[start : start + SAMPLE_TOKENS].astype("<i8").tobytes())
        return digest.hexdigest()


def find_cut(tokens_N: np.ndarray, end_id: int) -> int:
    """Where validation starts: after the first end token in the last twentieth, else at the twentieth."""
    cut = len(tokens_N) - len(tokens_N) // HELD_OUT
    for start in range(cut, len(tokens_N), 1 << 20):
        found = np.flatnonzero(tokens_N[start : start + (1 << 20)] == end_id)
        if len(found):
            return start + int(found[0]) + 1
    return cut


def map_tokens(key: str, path: str) -> np.ndarray:
    """A token file as a read-only memory map of shape (N)."""
    file = os.path.expanduser(path)
    if not os.path.isfile(file) or not file.endswith((".npy", ".bin")):
        raise ConfigError(
            f"{key} must be a .npy or .bin file of token ids for data.corpus = 'tokens'; {path!r} is not "
            f"(from {os.getcwd()!r}).",
            f"Set {key} to such a file; docs/data.md shows how to make one.",
        )
    if file.endswith(".bin"):
        dtype = np.dtype("<u4" if file.endswith(".uint32.bin") else "<u2")
        size = os.path.getsize(file)
        if size == 0 or size % dtype.itemsize:
            raise ConfigError(
                f"{key} = {path!r} must hold {dtype.name} ids, {dtype.itemsize} bytes each; it has {size} bytes.",
                "Name files of 4-byte ids *.uint32.bin; other .bin files hold 2-byte ids.",
            )
        return np.memmap(file, dtype=dtype, mode="r")
    try:
        array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ConfigError(
            f"{key} = {path!r} is not a .npy file of numbers: {error}", "Write it with numpy.save."
        ) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"{key} = {path!r} must hold a one-dimensional integer array; it is {array.dtype} of shape {array.shape}.",
            "Save the ids of all documents, each followed by the end token, as one array.",
        )
    return array


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
