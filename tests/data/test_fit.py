"""Best-fit packing: whole documents, each token a target once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.fit import FittedWindows, best_fit

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
    windows = FittedWindows(np.concatenate(documents), 64, 0, END)
    cut = sum(len(document) > 65 for document in documents)
    rows = windows.rows(range(windows.num_windows))
    ends = sum(map(bool, (rows == END).ravel())) - len(documents)
    assert windows.cut == cut > 0
    assert windows.padding == ends
    assert windows.padding / rows.size < 0.02
    assert windows.told() == (
        f"packing best_fit: {windows.num_windows:,} sequences, {windows.padding / rows.size:.2%} padding, "
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
