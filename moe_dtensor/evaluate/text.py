"""Texts: their tokens as lm-eval has them; perplexity and bits per byte, in windows that count every token once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.files import find_files
from moe_dtensor.data.records import BadRecords, read_records
from moe_dtensor.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from moe_dtensor.evaluate.score import Request, Score


class Encoder:
    """A tokenizer with the tokens that it puts before a text.

    Args:
        tokenizer: of the model.
        folder: of its files; a tokenizer_config.json there may name a begin token.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.prefix_id = tokenizer.end_id
        """What a document's first token is foretold from: the begin token if there is one, else the end token."""
        self.begin: list[int] = []
        """What the tokenizer itself puts before every text."""
        self.begin_text = ""
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            return
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        named = settings.get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        self.begin = tokenizer.begin_ids() if settings.get("add_bos_token", True) else []
        if isinstance(named, str) and (number := tokenizer.id_of(named)) is not None:
            self.prefix_id, self.begin_text = number, named
            if settings.get("add_bos_token"):
                self.begin = [number]

    def __call__(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text; with ``begin`` after what the tokenizer puts before it, unless the text has it."""
        (ids,) = self.tokenizer.encode_batch([text])
        has_it = not begin or (self.begin_text and text.startswith(self.begin_text))
        return [*([] if has_it else self.begin), *(int(i) for i in ids)]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, and of what continues it. Spaces between them belong to the continuation.

        The whole is encoded at once, and cut where the context alone ends, as lm-eval does.
        """
        if not context:
            ids = self(continuation, begin=False)
            return ([self.prefix_id], ids) if ids[:1] != [self.prefix_id] else (ids[:1], ids[1:])
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        before = self(context)
        return before or [self.prefix_id], self(context + continuation)[len(before) :]


@dataclass(frozen=True)
class Text:
    """Documents, ready to be scored."""

    documents: int
    bytes: int
    """Of their text in UTF-8."""
    tokens: int
    """Without begin and end tokens."""
    requests: list[Request]


@dataclass(frozen=True)
class TextResult:
    """What a model makes of a text."""

    documents: int
    bytes: int
    tokens: int
    log_likelihood: float
    """Of all tokens, in nats; each document's first is foretold from the token that begins a document."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.log_likelihood / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token. It compares models of one tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Compares models of any tokenizers."""
        return -self.log_likelihood / (self.bytes * math.log(2))


def read_text(key: str, path: str, text_key: str, max_bad: float) -> list[str]:
    """Documents of a file, a folder or a glob, as ``data.corpus = "files"`` reads them; empty ones are left out.

    Args:
        key: what names the path, for errors.
        path: see :func:`moe_dtensor.data.files.find_files`.
        text_key: field of the text in JSON lines and tables.
        max_bad: share of records that may be skipped.

    Raises:
        ConfigError: no such file, a record without text, or nothing at all.
    """
    files = find_files(key, path)
    bad = BadRecords(max_bad)
    texts = []
    for file in files.taken:
        for record in read_records(file, files.formats[file], text_key):
            text = bad.take(record, file)
            if text:
                texts.append(text)
    bad.judge()
    if not texts:
        raise ConfigError(f"{key}: {path!r} has no text.", "Give a file with at least one document.")
    return texts


def prepare_text(texts: Sequence[str], encoder: Encoder, max_length: int, stride: int) -> Text:
    """Documents in windows, see :func:`windows`."""
    requests: list[Request] = []
    tokens = 0
    for text in texts:
        ids = encoder(text, begin=False)
        tokens += len(ids)
        requests += windows(ids, encoder.prefix_id, max_length, stride)
    return Text(len(texts), sum(len(text.encode()) for text in texts), tokens, requests)


def sum_text(text: Text, scores: Sequence[Score]) -> TextResult:
    """The result from the scores of the text's requests."""
    whole = math.fsum(score.log_likelihood for score in scores)
    return TextResult(text.documents, text.bytes, text.tokens, whole)


def windows(ids: Sequence[int], prefix: int, max_length: int, stride: int) -> Iterator[Request]:
    """Cut a document into windows of at most ``max_length`` inputs that score every token once.

    The first window scores all of its tokens, each later one the next ``stride``, after as many earlier ones as there
    is room for. With ``stride = max_length`` these are lm-eval's.

    Args:
        ids: of the document.
        prefix: token before the first.
        max_length: from 1.
        stride: from 1 to ``max_length``.
    """
    line = (prefix, *ids)
    done = 0
    while done < len(ids):
        end = min(len(ids), done + (stride if done else max_length))
        yield Request(line[max(0, end - max_length) : end + 1], end - done)
        done = end
