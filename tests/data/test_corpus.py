"""Which corpus a config names, and a corpus of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus

OWN = '''
from moe_dtensor.data import build_tokenizer

class Squares:
    """The documents 'i squared is ...', every tenth for validation."""

    def __init__(self, config):
        self.tokenizer = build_tokenizer(config.data.tokenizer)

    def documents(self, split):
        for i in range(500):
            if (i % 10 == 0) == (split == "validation"):
                yield f"{i} squared is {i * i}"

    def fingerprint(self):
        return "squares 500"

class Incomplete:
    def __init__(self, config):
        pass

    def documents(self, split):
        return iter(())
'''


def to_ids(text: str) -> bytes:
    """Its byte tokens, two bytes each."""
    return b"".join(i.to_bytes(2, "little") for i in text.encode())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with OWN in it."""
    (tmp_path / "own_corpus_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_corpus_module"
    sys.modules.pop("own_corpus_module", None)


def test_a_corpus_of_ones_own_feeds_the_loader(make_config, own_module: str) -> None:
    config = make_config(corpus=f"{own_module}:Squares")
    corpus = build_corpus(config)
    documents = {split: list(corpus.documents(split)) for split in ("train", "validation")}
    for split, other in (("train", "validation"), ("validation", "train")):
        batch = Loader(config, corpus, split).next_batch(0, 4)
        end = corpus.tokenizer.end_id
        joined = {s: end.to_bytes(2, "little").join(to_ids(d) for d in documents[s]) for s in documents}
        for row in batch.tokens_BS:
            ids = b"".join(int(i).to_bytes(2, "little") for i in row)
            assert ids in joined[split]
            assert ids not in joined[other]


def test_an_edited_module_is_tokenised_again(make_config, own_module: str, tmp_path: Path) -> None:
    """A fingerprint that its author forgot to change must not bring old tokens back."""
    config = make_config(corpus=f"{own_module}:Squares")
    before = Loader(config, build_corpus(config)).next_batch(0, 4)
    file = tmp_path / "own_corpus_module.py"
    file.write_text(OWN.replace("squared is", "times itself gives"))
    sys.modules.pop(own_module)
    after = Loader(config, build_corpus(config)).next_batch(0, 4)
    assert not torch.equal(before.tokens_BS, after.tokens_BS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", r"data\.corpus must be one of stdlib, files, conversations, datasets, tokens, random"),
        ("no_such_module:Name", r"data\.corpus = 'no_such_module:Name'.*No module named"),
        ("own_corpus_module:Name", r"data\.corpus = 'own_corpus_module:Name'.*no attribute 'Name'"),
        ("own_corpus_module:Incomplete", r"missing: fingerprint, tokenizer, vocab_size"),
    ],
)
def test_a_corpus_that_cannot_be_had_is_named(make_config, own_module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_corpus(make_config(corpus=name))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_config, text_files: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)256 < 257.*model\.vocab_size = 0"):
        build_corpus(make_config(corpus="files", path=str(text_files), vocab_size=256))
    build_corpus(make_config(corpus="files", path=str(text_files), vocab_size=257))


def test_a_tokenizer_file_reaches_the_batches(make_config, text_files: Path, tokenizer_file: Path) -> None:
    config = make_config(corpus="files", path=str(text_files), tokenizer=str(tokenizer_file), document_mask=True)
    corpus = build_corpus(config)
    batch = Loader(config, corpus).next_batch(0, 4)
    assert corpus.tokenizer.vocab_size < 400
    assert "file" in corpus.tokenizer.decode(torch.cat(list(batch.tokens_BS)).tolist())
    for _ in range(20):
        ends = batch.tokens_BS == corpus.tokenizer.end_id
        assert (batch.labels_BS[ends] == -100).all()
        assert (batch.labels_BS[~ends] != -100).all()
