"""Data: corpora, tokenizers, packing into windows, and the loader of global batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dtensor.data.corpus import Corpus, build_corpus
from moe_dtensor.data.report import describe
from moe_dtensor.data.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from moe_dtensor.data.loader import Batch, Loader

__all__ = ["Batch", "Corpus", "Loader", "Tokenizer", "build_corpus", "build_tokenizer", "describe"]


def __getattr__(name: str) -> Any:
    """Batches are torch's; what makes tokens loads no torch."""
    if name in ("Batch", "Loader"):
        from moe_dtensor.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
