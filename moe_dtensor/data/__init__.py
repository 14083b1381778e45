"""Data: corpora, tokenizers, packing into windows, and the loader of global batches."""

from moe_dtensor.data.corpus import Corpus, build_corpus
from moe_dtensor.data.loader import Batch, Loader
from moe_dtensor.data.summary import describe
from moe_dtensor.data.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Batch", "Corpus", "Loader", "Tokenizer", "build_corpus", "build_tokenizer", "describe"]
