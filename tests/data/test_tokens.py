"""Token files: their forms, splits and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus

END = 256


def make_ids() -> np.ndarray:
    """1000 ids with an end token every 30."""
    ids = np.random.default_rng(0).integers(256, size=1000)
    ids[29::30] = END
    return ids


@pytest.mark.parametrize("name", ["a.npy", "a.bin", "a.uint16.bin", "a.uint32.bin"])
def test_every_form_gives_the_same_ids(make_config, tmp_path: Path, name: str) -> None:
    path, ids = tmp_path / name, make_ids()
    if name == "a.npy":
        np.save(path, ids)
    else:
        ids.astype("<u4" if "32" in name else "<u2").tofile(path)
    corpus = build_corpus(make_config(corpus="tokens", path=str(path)))
    train, validation = corpus.token_array("train"), corpus.token_array("validation")
    np.testing.assert_array_equal(np.concatenate([train, validation]), ids)
    assert train[-1] == END  # the cut is at the end of a document
    assert 10 < len(validation) <= 50
    joined = [i for d in corpus.documents("train") for i in [*d.tolist(), END]]
    assert joined == train.tolist()


def test_without_end_tokens_the_last_twentieth_is_held_out(make_config, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(200))
    corpus = build_corpus(make_config(corpus="tokens", path=str(tmp_path / "a.npy")))
    assert corpus.token_array("validation").tolist() == list(range(190, 200))
    assert [len(d) for d in corpus.documents("train")] == [190]


def test_fingerprint_follows_the_tokens(make_config, tmp_path: Path) -> None:
    prints = set()
    for place in (None, 0, 500, 940):
        ids = make_ids()
        if place is not None:
            ids[place] += 1
        np.save(tmp_path / "a.npy", ids)
        prints.add(build_corpus(make_config(corpus="tokens", path=str(tmp_path / "a.npy"))).fingerprint())
    assert len(prints) == 4


def test_ids_of_another_tokenizer_are_refused_when_met(make_config, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full(2000, 257))
    config = make_config(corpus="tokens", path=str(tmp_path / "a.npy"))
    with pytest.raises(ConfigError, match=r"\[0, 257\).*257 to 257"):
        Loader(config, build_corpus(config)).next_batch(0, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", None, r"data\.path must be a \.npy or \.bin file"),
        ("a.txt", b"12", r"data\.path must be a \.npy or \.bin file"),
        ("a.bin", b"123", r"uint16 ids, 2 bytes each; it has 3 bytes"),
        ("a.uint32.bin", b"123456", r"uint32 ids, 4 bytes each; it has 6 bytes"),
        ("a.bin", b"", r"it has 0 bytes"),
        ("a.npy", b"no array", r"is not a \.npy file"),
        ("a.npy", np.zeros((2, 3), int), r"one-dimensional integer array; it is int64 of shape \(2, 3\)"),
        ("a.npy", np.zeros(3), r"one-dimensional integer array; it is float64"),
    ],
)
def test_other_files_are_refused(make_config, tmp_path: Path, name: str, content, message: str) -> None:
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_corpus(make_config(corpus="tokens", path=str(tmp_path / name)))
