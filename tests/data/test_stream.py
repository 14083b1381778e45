"""Streamed corpora: local datasets, random tokens, and a corpus of one's own without a state."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus, build_tokenizer
from moe_dtensor.data.stream import StreamWindows, TokenStream

TEXTS = [f"record {i} " * (1 + i % 5) for i in range(100)]


def write_folder(folder: Path, kind: str) -> str:
    folder.mkdir()
    for shard in range(2):
        texts = TEXTS[shard::2]
        if kind == "jsonl":
            (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        elif kind == "parquet":
            table = pyarrow.table({"text": texts})
            pyarrow.parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=7)
        else:
            for i, text in enumerate(texts[:15]):
                (folder / f"{shard}-{i:03}.txt").write_text(text + "\n\nsecond paragraph")
    return str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_local_folder_is_read_whole_and_split_by_text(make_config, tmp_path: Path, kind: str) -> None:
    config = make_config(corpus="datasets", path=write_folder(tmp_path / "folder", kind))
    corpus = build_corpus(config)
    train, validation = list(corpus.documents("train")), list(corpus.documents("validation"))
    expected = [t + "\n\nsecond paragraph" for t in TEXTS[:30]] if kind == "txt" else TEXTS
    assert sorted(train + validation) == sorted(expected)
    assert 0 < len(validation) < 15


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_an_iterator_goes_on_from_its_state(make_config, tmp_path: Path, kind: str) -> None:
    corpus = build_corpus(make_config(corpus="datasets", path=write_folder(tmp_path / "folder", kind)))
    documents = corpus.documents("train")
    assert documents.state_dict() is None
    for count in (0, 1, 17, 70 if kind != "txt" else 20):  # in the first shard and in the second
        documents = corpus.documents("train")
        for _ in range(count):
            next(documents)
        resumed = corpus.documents("train")
        resumed.load_state_dict(json.loads(json.dumps(documents.state_dict())))
        rest = list(documents)
        assert rest
        assert list(resumed) == rest


def test_a_file_and_another_split(make_config, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "jsonl")
    (tmp_path / "folder" / "test.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    config = make_config(corpus="datasets", path=f"{folder}@train", validation_path=f"{folder}@test")
    corpus = build_corpus(config)
    assert list(corpus.documents("validation")) == ["held out"]
    one = build_corpus(make_config(corpus="datasets", path=f"{folder}/0.jsonl"))
    assert sorted([*one.documents("train"), *one.documents("validation")]) == sorted(TEXTS[::2])
    assert one.fingerprint() != corpus.fingerprint()


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("./nowhere", {}, r"data\.path .*'\./nowhere' does not exist"),
        ("{folder}", {"split": "nope"}, r"(?s)data\.path .*split 'nope'.*data\.split"),
        ("{folder}", {"text_key": "body"}, r"(?s)data\.text_key.*'body'.*\['text'\]"),
        ("{folder}/0.xyz", {}, r"data\.path must be a text file.*0\.xyz: empty"),
        ("{folder}", {"validation_path": "/nowhere"}, r"data\.validation_path .* does not exist"),
    ],
)
def test_wrong_datasets_are_named(make_config, tmp_path: Path, path: str, fields: dict, message: str) -> None:
    folder = write_folder(tmp_path / "folder", "jsonl")
    config = make_config(corpus="datasets", path=path.format(folder=folder), **fields)
    (tmp_path / "folder" / "0.xyz").write_text("")
    split = "validation" if "validation_path" in fields else "train"
    with pytest.raises(ConfigError, match=message):
        Loader(config, build_corpus(config), split)


def test_a_missing_package_is_named(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"(?s)package datasets.*pip install datasets"):
        build_corpus(make_config(corpus="datasets", path="some/name")).documents("train")


class Letters:
    """A streaming corpus whose iterator has no state."""

    streaming = True

    def __init__(self, config) -> None:
        self.tokenizer = build_tokenizer(config.data.tokenizer)

    def documents(self, split):
        for i in range(200):
            yield chr(97 + i % 26) * (1 + i % 11)

    def fingerprint(self):
        return "letters"


def test_an_iterator_without_a_state_is_read_again(make_config) -> None:
    config = make_config(corpus=f"{__name__}:Letters")
    loader = Loader(config, build_corpus(config))
    for _ in range(70):
        loader.next_batch(0, 4)
    state = loader.state_dict()
    assert json.loads(state["position"])["windows"]["epoch"] > 0
    resumed = Loader(config, build_corpus(config))
    resumed.load_state_dict(state)
    for _ in range(70):
        assert torch.equal(loader.next_batch(0, 4).tokens_BS, resumed.next_batch(0, 4).tokens_BS)
        assert loader.state_dict() == resumed.state_dict()  # so that it can be resumed once more


def test_the_stream_is_the_documents_over_and_over(make_config) -> None:
    corpus = Letters(make_config())
    once = [i for d in corpus.documents("train") for i in [*d.encode(), 256]]
    stream = TokenStream(corpus, "train", least=100)
    read = [stream.read(50) for _ in range(100)]
    joined = [int(i) for r in read for i in r[:-1]]
    assert joined == (once * 10)[: len(joined)]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(read))


def test_blocks_are_shuffled_by_the_seed_and_keep_their_windows(make_config) -> None:
    def read(seed: int, block_windows: int) -> np.ndarray:
        stream = TokenStream(Letters(make_config()), "train", least=100)
        return StreamWindows(stream, 16, seed, block_windows).read(24, 0, 24)

    in_order, shuffled, other = read(0, 1), read(0, 8), read(1, 8)
    assert not np.array_equal(shuffled, other)
    orders = set()
    for start in range(0, 24, 8):
        block = in_order[start : start + 8].tolist()
        order = [block.index(window) for window in shuffled[start : start + 8].tolist()]
        assert sorted(order) == list(range(8))
        orders.add(tuple(order))
    assert len(orders) == 3  # each block has its own
    assert tuple(range(8)) not in orders


def test_random_tokens_fill_the_model_vocabulary_and_differ_by_split(make_config) -> None:
    config = make_config(corpus="random", vocab_size=1000, seq_len=512)
    corpus = build_corpus(config)
    train = Loader(config, corpus).next_batch(0, 4)
    assert 900 < train.tokens_BS.max() < 1000
    assert len(train.tokens_BS.unique()) > 800
    documents = [next(corpus.documents(split)) for split in ("train", "train", "validation")]
    assert np.array_equal(documents[0], documents[1])
    assert (documents[0] != documents[2]).mean() > 0.9
