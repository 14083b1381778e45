"""Packing documents into the cached token file."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import build_corpus, build_tokenizer, files, pack


class Fixed:
    """A corpus of given documents."""

    def __init__(self, documents, name="one") -> None:
        self.tokenizer = build_tokenizer("bytes")
        self.given, self.name, self.calls = documents, name, 0

    def documents(self, split):
        self.calls += 1
        yield from self.given

    def fingerprint(self):
        return self.name


def test_every_document_is_followed_by_the_end_token() -> None:
    documents = ["ab", "", b"c", np.array([1, 256, 2])]
    tokens = pack.packed(Fixed(documents), "train").tokens_N
    assert tokens.tolist() == [97, 98, 256, 99, 256, 1, 256, 2, 256]  # nothing for the empty one
    assert tokens.dtype == np.dtype("<u2")


def test_a_large_vocabulary_takes_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pack.token_dtype(n).itemsize for n in (257, 65536, 65537)] == [2, 2, 4]
    corpus = Fixed([np.array([70000])])
    monkeypatch.setattr(corpus.tokenizer, "vocab_size", 70001)
    assert pack.packed(corpus, "train").tokens_N.tolist() == [70000, 256]


@pytest.mark.parametrize("ids", [[257], [-1]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int], cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 257\)"):
        pack.packed(Fixed(["fine", np.array(ids)]), "train")
    assert not list(cache.glob("*.bin*"))  # nothing half-written stays
    assert not list(cache.glob("*.json*"))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i}" for i in range(200)]
    whole = pack.packed(Fixed(documents, "a"), "train")
    monkeypatch.setattr(pack, "CHUNK_SIZE", 30)
    small = pack.packed(Fixed(documents, "b"), "train")
    np.testing.assert_array_equal(whole.tokens_N, small.tokens_N)
    assert whole.digest == small.digest
    assert pack.take_chunk(iter(documents)) == documents[:3]


def test_tokens_are_made_once_and_again_when_the_corpus_changes() -> None:
    corpus = Fixed(["text"])
    first, second = pack.packed(corpus, "train"), pack.packed(corpus, "train")
    assert corpus.calls == 1
    assert first.digest == second.digest
    corpus.name, corpus.given = "two", ["other"]
    assert pack.packed(corpus, "train").digest != first.digest
    pack.packed(corpus, "validation")
    assert corpus.calls == 3


def test_ranks_that_start_together_tokenise_once() -> None:
    class Slow(Fixed):
        def documents(self, split):
            time.sleep(0.1)
            return super().documents(split)

    corpus = Slow(["text"] * 50)
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda _: pack.packed(corpus, "train").digest, range(4)))
    assert corpus.calls == 1
    assert len(set(found)) == 1


def test_tokens_without_their_record_are_made_again(cache: Path) -> None:
    """A build that died between its two files must not be taken for a whole one."""
    corpus = Fixed(["text"])
    whole = pack.packed(corpus, "train").tokens_N.tolist()
    next(cache.glob("*.json")).unlink()
    next(cache.glob("*.bin")).write_bytes(b"\x01\x00")
    assert pack.packed(corpus, "train").tokens_N.tolist() == whole
    assert json.loads(next(cache.glob("*.json")).read_text())["split"] == "train"


def test_an_empty_split_is_an_empty_array() -> None:
    assert len(pack.packed(Fixed([]), "train").tokens_N) == 0


def test_edited_files_are_tokenised_again(make_config, tmp_path: Path) -> None:
    config = make_config(corpus="files", path=str(tmp_path / "a.txt"))
    tokens = []
    for text in ("first", "second"):
        (tmp_path / "a.txt").write_text(text)
        tokens.append(bytes(pack.packed(build_corpus(config), "train").tokens_N[:-1].tolist()))
    assert tokens == [b"first", b"second"]


def test_an_unwritable_cache_falls_back_to_a_temporary_folder(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert pack.cache_folder().parent == tmp_path / "temporary"
