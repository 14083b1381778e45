"""Token ids that carry what is to be done with them, in bits that no vocabulary reaches. N tokens, B windows.

Documents of a plain corpus end with an end token, and all of their tokens are targets. Conversations end as their
template has it, with end tokens in between, and only some of their tokens are targets: each id says so itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_dtensor.config.errors import ConfigError

TRAINED = 1 << 31
"""The token is a target."""
FIRST = 1 << 30
"""A document begins with it."""
PADDING = 1 << 29
"""It is no document's."""
IDS = PADDING - 1
"""All bits of an id."""
DTYPE = np.dtype("<u4")


class Conversation(str):
    """The text of a conversation.

    ``spans``: characters that are trained on, (first, after the last) in order.
    """

    spans: Sequence[tuple[int, int]] = ()


def join_conversations(documents: list[Any], tokenizer: Any, dtype: np.dtype = DTYPE) -> np.ndarray:
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
