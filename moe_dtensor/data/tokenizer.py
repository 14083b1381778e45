"""Text to token ids and back: byte values, or a Hugging Face ``tokenizer.json``.

The ``tokenizers`` library is used directly. torchtitan's wrapper wants a folder with a ``tokenizer_config.json``
beside the vocabulary to know an end token, lets the post-processor add begin tokens inside packed text, and encodes
one text at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_dtensor.config.errors import ConfigError

# Names that vocabularies without a tokenizer_config.json give to their end token.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
# One string of many megabytes costs the library some fifty times its size in memory.
PIECE_CHARACTERS = 1_000_000


Placed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids of a text, the first character that each stands for, and the one after the last."""


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    vocab_size: int
    """Ids are in ``[0, vocab_size)``."""
    end_id: int
    """Id that closes every document."""

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """One integer array of ids per text, without end token."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids."""

    def fingerprint(self) -> str:
        """Differs between tokenizers that give different ids."""


class ByteTokenizer:
    """The 256 byte values of UTF-8, and 256 as the end token."""

    vocab_size = 257
    end_id = 256

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """One uint8 array of byte values per text; ``bytes`` are taken as they are."""
        return [np.frombuffer(t.encode() if isinstance(t, str) else t, dtype=np.uint8) for t in texts]

    def encode_with_places(self, texts: Sequence[str]) -> list[Placed]:
        """Ids of each text with the characters that they stand for."""
        placed = []
        for text in texts:
            size_C = np.array([len(c.encode()) for c in text], np.int64)
            start_N = np.repeat(np.arange(len(text)), size_C)
            placed.append((self.encode_batch([text])[0], start_N, start_N + 1))
        return placed

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; end tokens are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if int(i) < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """Constant."""
        return "bytes-257"


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, without the begin and end tokens its post-processor would add.

    Text that spells a special token (``<|endoftext|>``) becomes that token.

    Args:
        path: the file, or a folder that holds ``tokenizer.json``. The end token is the ``eos_token`` of a
            ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, else the first of ``END_TOKENS`` in the
            vocabulary.

    Raises:
        ConfigError: no such file, not a tokenizer, or no end token that it has.
    """

    def __init__(self, path: str) -> None:
        # Forked ranks would each print a warning, and several ranks share the cores anyhow.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._path = path
        file = Path(os.path.expanduser(path))
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"data.tokenizer must be bytes, a tokenizer.json, or a folder that holds one; "
                f"there is no file {str(file)!r}.",
                "Set data.tokenizer = 'bytes', or to the file's path.",
            )
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(
                f"data.tokenizer = {path!r}: {str(file)!r} is not a Hugging Face tokenizer ({error}).",
                "Give a tokenizer.json as written by the tokenizers library.",
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes
        self.end_id = find_end_token(file, vocabulary)
        self._digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """One uint32 array per text. Texts over a million characters are encoded in pieces that end with a line."""
        pieces: list[str] = []
        counts = []
        for text in texts:
            cut = list(cut_in_pieces(text if isinstance(text, str) else text.decode(errors="replace")))
            counts.append(len(cut))
            pieces += cut
        encoded = self._encode(self._library.encode_batch_fast, pieces)
        ids = iter([np.array(e.ids, dtype=np.uint32) for e in encoded])
        return [np.concatenate([next(ids) for _ in range(n)] or [np.empty(0, np.uint32)]) for n in counts]

    def encode_with_places(self, texts: Sequence[str]) -> list[Placed]:
        """Ids of each text, encoded as a whole, with the characters that they stand for."""
        placed = []
        for one in self._encode(self._library.encode_batch, texts):
            start_N, end_N = np.array(one.offsets, np.int64).reshape(-1, 2).T
            placed.append((np.array(one.ids, np.uint32), start_N, end_N))
        return placed

    def _encode(self, encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
        try:
            return encode(texts, add_special_tokens=False)
        except BaseException as error:  # the library's own errors are plain Exceptions, its panics not even that
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ConfigError(
                f"data.tokenizer = {self._path!r} cannot encode a text of the corpus ({error}).",
                "A vocabulary needs a token for what it does not know (unk_token), or byte fallback.",
            ) from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids, special tokens left out."""
        return self._library.decode([int(i) for i in ids])

    def begin_ids(self) -> list[int]:
        """What its post-processor puts before every text."""
        alone = self._library.encode("", add_special_tokens=True).ids
        around = self._library.encode("a", add_special_tokens=True).ids
        bare = self._library.encode("a", add_special_tokens=False).ids
        before = next((n for n in range(len(around)) if around[n : n + len(bare)] == bare), 0)
        return alone[:before]

    def id_of(self, token: str) -> int | None:
        """Id of a token; None if there is none of that text."""
        return self._library.token_to_id(token)

    def fingerprint(self) -> str:
        """Digest of the file and its end token."""
        return f"{self._digest}-{self.end_id}"


def cut_in_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of about ``PIECE_CHARACTERS``, each but the last ending with a line where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        end = end if end > start else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def find_end_token(file: Path, vocabulary: dict[str, int]) -> int:
    """Id of the end token of the ``tokenizer.json`` ``file``.

    Raises:
        ConfigError: there is none, a file beside it names one that the vocabulary lacks, or that file is broken.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = file.with_name(name)
        token = read_end_token(beside) if beside.is_file() else None
        if token in vocabulary:
            return vocabulary[token]
        if token is not None:
            raise ConfigError(
                f"data.tokenizer: {str(beside)!r} names the eos_token {token!r}, which {str(file)!r} does not have.",
                "Take both files from one model, or correct eos_token.",
            )
    for token in END_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise ConfigError(
        f"data.tokenizer needs an end token to join documents; {str(file)!r} has none of "
        f"{', '.join(END_TOKENS)}, and no "
        "tokenizer_config.json beside it names one of its tokens.",
        'Put {"eos_token": "<one of its tokens>"} into a tokenizer_config.json beside the file.',
    )


def read_end_token(file: Path) -> str | None:
    """The ``eos_token`` that a tokenizer's settings name, if they do."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        token: Any = content.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"data.tokenizer: {str(file)!r} must be a JSON object ({type(error).__name__}: {error}).",
            "Copy the file again, or remove it: then the vocabulary's usual end token is taken.",
        ) from error
    if token is not None and not isinstance(token, str):
        raise ConfigError(
            f"data.tokenizer: the eos_token in {str(file)!r} must be a text; it is {token!r}.", "Correct the file."
        )
    return token


def files_beside(name: str) -> Path:
    """The folder of the files beside the tokenizer that ``data.tokenizer`` names; of ``bytes`` one that has none."""
    named = Path(name).expanduser()
    return named if named.is_dir() else named.parent


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``bytes`` or a path."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
