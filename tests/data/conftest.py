"""Fixtures for the data tests: small configs, and a cache that ends with the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.model import Model
from moe_dtensor.config.schema import Config, Data, Training


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe_dtensor"


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """Config with short sequences and small batches; keywords are fields of [data], or of [training] and [model]."""

    def make(seq_len: int = 16, global_batch_size: int = 4, seed: int = 0, vocab_size: int = 0, **data: Any) -> Config:
        training = Training(seq_len=seq_len, global_batch_size=global_batch_size, seed=seed)
        return Config(model=Model(vocab_size=vocab_size), data=Data(**data), training=training)

    return make


@pytest.fixture
def text_files(tmp_path: Path) -> Path:
    """A folder of 40 distinct .txt files of about 100 characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"file {i} " + " ".join(str(i * j) for j in range(30)) + "\n")
    return folder


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer.json trained on a little text, with <|endoftext|> as a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog sat on the cat"] * 20, trainer)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path
