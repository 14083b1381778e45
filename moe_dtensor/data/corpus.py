"""What a corpus is, the one that a config names, and several as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load_object
from moe_dtensor.config.schema import Config, Source
from moe_dtensor.data.conversations import ConversationsCorpus
from moe_dtensor.data.files import check_apart
from moe_dtensor.data.hub import DatasetsCorpus
from moe_dtensor.data.pack import Document
from moe_dtensor.data.text import FilesCorpus, StdlibCorpus
from moe_dtensor.data.tokenizer import Tokenizer, build_tokenizer
from moe_dtensor.data.tokens import RandomCorpus, TokensCorpus


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
    "conversations": ConversationsCorpus,
    "datasets": DatasetsCorpus,
    "tokens": TokensCorpus,
    "random": RandomCorpus,
}


def build_corpus(config: Config) -> Corpus:
    """The corpus that ``data.corpus`` names, or the mixture of ``data.sources``.

    Raises:
        ConfigError: no such corpus, or something of its files, tokenizer or vocabulary is wrong.
    """
    if not config.data.sources:
        return build_one(config)
    corpora = [build_one(source_config(config, source)) for source in config.data.sources]
    prints = {
        corpus.tokenizer.fingerprint(): source.name for corpus, source in zip(corpora, config.data.sources, strict=True)
    }
    if len(prints) > 1:
        raise ConfigError(
            f"[[data.sources]] need one tokenizer; {' and '.join(prints.values())} have different ones.",
            "Let your own corpora use build_tokenizer(config.data.tokenizer).",
        )
    return Mixture(config.data.sources, corpora, corpora[0].tokenizer)


def build_one(config: Config) -> Corpus:
    """The corpus of a config without sources."""
    name = config.data.corpus
    if name in BUILT_IN:
        corpus = BUILT_IN[name](config, build_tokenizer(config.data.tokenizer))
    elif ":" in name:
        corpus = build_own_corpus(name, config)
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


def _is_corpus(found: Any) -> bool:
    """Whether an object can be a corpus; what else is missing in it is told later."""
    return isinstance(found, type) and callable(getattr(found, "documents", None))


def build_own_corpus(name: str, config: Config) -> Corpus:
    """An instance of the class that ``package.module:Name`` names, checked for what a corpus needs."""
    what = "a class with documents(split) and fingerprint()"
    corpus = load_object("data.corpus", name, _is_corpus, what)(config)
    wanted = {"documents": corpus, "fingerprint": corpus, "tokenizer": corpus}
    wanted |= dict.fromkeys(("vocab_size", "end_id", "encode_batch", "fingerprint"), getattr(corpus, "tokenizer", None))
    missing = [part for part, owner in wanted.items() if not hasattr(owner, part)]
    if missing:
        raise ConfigError(
            f"data.corpus = {name!r}: a corpus needs documents(split), fingerprint() and a tokenizer; "
            f"missing: {', '.join(missing)}.",
            "Add them: docs/data.md shows a whole class.",
        )
    return corpus


def set_vocabulary(config: Config, corpus: Corpus) -> Config:
    """Fill in ``model.vocab_size`` from the tokenizer where the config leaves it open."""
    if config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=corpus.tokenizer.vocab_size))


class Mixture:
    """The corpora of ``[[data.sources]]``.

    Raises:
        ConfigError: one trains on what another holds out.
    """

    def __init__(self, sources: tuple[Source, ...], corpora: list[Any], tokenizer: Tokenizer) -> None:
        self.sources, self.corpora, self.tokenizer = sources, corpora, tokenizer
        self.names = [source.name for source in sources]
        for one in corpora:
            for other in corpora:
                check_apart(paths(one, "files"), paths(other, "validation_files"), "data.sources")

    def documents(self, split: str) -> Iterator[Any]:
        """The documents of one source after the other."""
        for corpus in self.corpora:
            yield from corpus.documents(split)

    def fingerprint(self) -> str:
        """Of all sources with their names."""
        prints = [(name, corpus.fingerprint()) for name, corpus in zip(self.names, self.corpora, strict=True)]
        return hashlib.blake2b(repr(prints).encode(), digest_size=16).hexdigest()


def paths(corpus: Any, attribute: str) -> list[str]:
    """The files that a corpus reads as text."""
    return list(getattr(getattr(corpus, attribute, None), "taken", ()))


def source_config(config: Config, source: Source) -> Config:
    """The config of a source by itself."""
    data = config.data
    return replace(
        config,
        data=replace(
            data,
            corpus=source.corpus,
            path=source.path,
            validation_path=source.validation_path,
            text_key=source.text_key or data.text_key,
            split=source.split or data.split,
            revision=source.revision,
            sources=(),
        ),
        stages=(),
    )
