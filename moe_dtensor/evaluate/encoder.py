"""Text to tokens as lm-eval has it: what begins a text, and where a continuation begins."""

from __future__ import annotations

import json
from pathlib import Path

from moe_dtensor.data.tokenizer import HuggingFaceTokenizer, Tokenizer


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
