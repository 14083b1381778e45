"""Windows: their order, for any place at once; best-fit packing, where each token is a target once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus, windows
from moe_dtensor.data.windows import FittedWindows, Permutation, best_fit

END = 256


def make_documents(count: int, longest: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = np.minimum(longest, generator.geometric(1 / 12, count))
    return [[*generator.integers(256, size=n).tolist(), END] for n in lengths]


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    assert best_fit(np.array([3, 6, 5, 4, 2, 2]), 8).tolist() == [1, 0, 1, 2, 0, 2]
    assert best_fit(np.array([8, 8]), 8).tolist() == [0, 1]
    assert best_fit(np.array([], np.int64), 8).tolist() == []


@pytest.mark.parametrize("longest", [16, 100])
def test_every_target_comes_once_and_documents_are_whole(make_config, tmp_path: Path, longest: int) -> None:
    documents = make_documents(500, longest)
    np.save(tmp_path / "a.npy", np.concatenate(documents))
    np.save(tmp_path / "held.npy", np.concatenate(documents))
    config = make_config(
        corpus="tokens",
        path=str(tmp_path / "a.npy"),
        validation_path=str(tmp_path / "held.npy"),
        document_mask=True,
        packing="best_fit",
        global_batch_size=1,
    )
    loader = Loader(config, build_corpus(config))
    found: dict[tuple[int, ...], int] = {}
    for _ in range(loader.windows.num_windows):
        batch = loader.next_batch(0, 1)
        [tokens], [labels] = batch.tokens_BS.tolist(), batch.labels_BS.tolist()
        [numbers] = batch.documents_BS.tolist()
        for number in range(numbers[-1] + 1):
            inside = [i for i, n in enumerate(numbers) if n == number]
            targets = [labels[i] for i in inside if labels[i] != -100]
            assert targets == [tokens[i] for i in inside[1:]] or targets[:-1] == [tokens[i] for i in inside[1:]]
            if targets:
                piece = (tokens[inside[0]], *targets)
                found[piece] = found.get(piece, 0) + 1
    expected: dict[tuple[int, ...], int] = {}
    for document in documents:
        for start in range(0, len(document) - 1, 16):
            piece = tuple(document[start : start + 17])
            expected[piece] = expected.get(piece, 0) + 1
    assert found == expected


def test_the_share_of_padding_and_of_cut_documents_is_told() -> None:
    documents = make_documents(2000, 100)
    fitted = FittedWindows(np.concatenate(documents), 64, 0, END)
    cut = sum(len(document) > 65 for document in documents)
    rows = fitted.rows(range(fitted.num_windows))
    ends = sum(map(bool, (rows == END).ravel())) - len(documents)
    assert fitted.cut == cut > 0
    assert fitted.padding == ends
    assert fitted.padding / rows.size < 0.02
    assert fitted.told() == (
        f"packing best_fit: {fitted.num_windows:,} sequences, {fitted.padding / rows.size:.2%} padding, "
        f"{cut / 2000:.2%} of the documents cut"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "stdlib"}, "document_mask = false"),
        ({"corpus": "random", "document_mask": True}, "as training goes"),
    ],
)
def test_what_best_fit_cannot_do_is_refused(make_config, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(make_config(packing="best_fit", **fields), 1)


def test_a_streamed_corpus_of_ones_own_cannot_be_fitted(make_config) -> None:
    config = make_config(corpus="tests.data.test_stream:Letters", document_mask=True, packing="best_fit")
    with pytest.raises(ConfigError, match="Letters is streamed"):
        Loader(config, build_corpus(config))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1000])
def test_a_permutation_visits_every_entry_once(size: int) -> None:
    orders = [Permutation(size, seed, "web", epoch)(np.arange(size)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert len({tuple(order) for order in orders}) == 4


def test_an_order_outlives_every_upgrade() -> None:
    """It was numpy's, whose streams may change with a version: a run would be reordered silently. Change no number."""
    order = Permutation(16, 7, "web", 1)(np.arange(16)).tolist()
    assert "".join(f"{entry:x}" for entry in order) == "10e78afc439d526b"
    assert Permutation(10**12, 7)(np.arange(4)).tolist() == [498714752485, 488729573822, 125428104801, 603305823404]


def test_a_permutation_looks_shuffled() -> None:
    order = Permutation(10000, 0)(np.arange(10000))
    assert abs(np.corrcoef(np.arange(10000), order)[0, 1]) < 0.05
    assert len(np.flatnonzero(np.diff(order) == 1)) < 10  # neighbours do not stay neighbours
    assert np.array_equal(Permutation(10000, 0)(np.array([7, 42])), order[[7, 42]])
    assert Permutation(10**12, 0)(np.arange(1000)).max() > 9 * 10**11


def test_a_large_array_needs_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a position that an older version saved stays in the order of its table."""
    tokens_N = np.arange(8001)
    old = windows.ArrayWindows(tokens_N, 8, 0)
    old.read(30, 0, 30)
    monkeypatch.setattr(windows, "TABLE_WINDOWS", 999)
    new, resumed = windows.ArrayWindows(tokens_N, 8, 0), windows.ArrayWindows(tokens_N, 8, 0)
    assert sorted(new.rows(range(1000))[:, 0].tolist()) == list(range(0, 8000, 8))
    resumed.load_state(old.state())
    assert np.array_equal(resumed.read(10, 0, 10), old.read(10, 0, 10))
    again = windows.ArrayWindows(tokens_N, 8, 0)
    new.read(30, 0, 30)
    again.load_state(json.loads(json.dumps(new.state())))
    assert np.array_equal(again.read(10, 0, 10), new.read(10, 0, 10))
    assert not np.array_equal(again.rows(range(30)), old.rows(range(30)))
