"""What a corpus is, and the one a config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.pack import Document
from moe_dtensor.data.text import FilesCorpus, StdlibCorpus
from moe_dtensor.data.tokenizer import Tokenizer, build_tokenizer


class Corpus(Protocol):
    """Documents with a tokenizer. Your own class takes the config and has these three.

    A finite corpus is tokenised once into a cached file. With a class attribute ``streaming = True`` it is read as
    training goes; then the iterator of ``documents`` may have ``state_dict()`` (JSON values) and
    ``load_state_dict(state)``, without which a resume reads it again from the start.
    """

    tokenizer: Tokenizer

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of ``train`` or ``validation``, the same in every process: text, or id arrays without end."""

    def fingerprint(self) -> str:
        """Changes when the documents do."""


BUILT_IN: dict[str, Callable[[Config, Tokenizer], Any]] = {
    "stdlib": StdlibCorpus,
    "files": FilesCorpus,
}


def build_corpus(config: Config) -> Corpus:
    """The corpus that ``data.corpus`` names.

    Raises:
        ConfigError: no such corpus, or something of its files, tokenizer or vocabulary is wrong.
    """
    name = config.data.corpus
    if name in BUILT_IN:
        corpus = BUILT_IN[name](config, build_tokenizer(config.data.tokenizer))
    elif ":" in name:
        corpus = load_own_corpus(name)(config)
    else:
        raise ConfigError(
            f"data.corpus must be one of {', '.join(BUILT_IN)}, or your own package.module:Name; it is {name!r}.",
            "Set data.corpus to one of them.",
        )
    size, limit = corpus.tokenizer.vocab_size, config.model.vocab_size
    if limit and size > limit:
        raise ConfigError(
            f"model.vocab_size must hold every id of the tokenizer: {limit} < {size} of data.tokenizer = "
            f"{config.data.tokenizer!r}.",
            f"Set model.vocab_size = 0 (the tokenizer's), or at least {size}.",
        )
    return corpus


def load_own_corpus(name: str) -> Callable[[Config], Any]:
    """The class that ``package.module:Name`` names, checked for what a corpus needs."""
    module_name, _, attribute = name.partition(":")
    try:
        corpus_class = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"data.corpus = {name!r} must name a class as package.module:Name; {error}.",
            "Check the spelling, and that the module can be imported from here (PYTHONPATH).",
        ) from error
    missing = [m for m in ("documents", "fingerprint") if not callable(getattr(corpus_class, m, None))]
    if missing:
        raise ConfigError(
            f"data.corpus = {name!r}: a corpus needs the methods documents(split) and fingerprint(); "
            f"{', '.join(missing)} missing.",
            "Add them: see moe_dtensor.data.corpus.Corpus.",
        )
    return corpus_class
