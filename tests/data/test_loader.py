"""Global batches: the same on every mesh, resumable, with document boundaries."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.data.loader import build_batch


def write_stream(folder, documents: int = 300) -> None:
    """jsonl shards of distinct documents of uneven length."""
    for shard in range(3):
        lines = [json.dumps({"text": f"{shard} {i} " * (1 + i % 7)}) for i in range(documents // 3)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))


@pytest.fixture(params=["files", "datasets", "random", "tokens"])
def config(request, make_config, text_files, tmp_path):
    """A config per kind of corpus, with document masks."""
    if request.param == "datasets":
        (tmp_path / "shards").mkdir()
        write_stream(tmp_path / "shards")
        return make_config(corpus="datasets", path=str(tmp_path / "shards"), document_mask=True)
    if request.param == "tokens":
        np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(257, size=20000))
        return make_config(corpus="tokens", path=str(tmp_path / "ids.npy"), document_mask=True)
    return make_config(corpus=request.param, path=str(text_files), document_mask=True)


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ranks_get_the_slices_of_one_global_batch(config) -> None:
    corpus = build_corpus(config)
    whole = [b for loader in [Loader(config, corpus)] for b in [loader.next_batch(0, 4) for _ in range(8)]]
    assert any(not torch.equal(whole[0].tokens_BS, b.tokens_BS) for b in whole[1:])
    for dp in (2, 4):
        share = 4 // dp
        for rank in range(dp):
            loader = Loader(config, build_corpus(config))
            first, last = rank * share, (rank + 1) * share
            for batch in whole:
                held = [getattr(batch, f.name) for f in fields(Batch)]
                part = Batch(*(None if x is None else x[first:last] for x in held))
                assert_equal(loader.next_batch(first, last), part)


def test_a_resumed_loader_goes_on_with_the_same_batches(config) -> None:
    corpus = build_corpus(config)
    loader = Loader(config, corpus)
    states, batches = [], []
    for _ in range(150):  # several epochs, several blocks
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.next_batch(0, 4))
    for step in (0, 1, 37, 63, 64, 65, 120):
        resumed = Loader(config, build_corpus(config))
        resumed.load_state_dict(states[step])
        for state, batch in list(zip(states, batches, strict=True))[step : step + 30]:
            assert resumed.state_dict() == state
            assert_equal(resumed.next_batch(0, 4), batch)
    assert max(len(s["position"]) for s in states) < 1000
    assert {tuple(s) for s in states} == {("position",)}


def test_batches_are_int64_and_labels_are_the_next_tokens(config) -> None:
    batch = Loader(replace(config, data=replace(config.data, document_mask=False)), build_corpus(config)).next_batch(
        0, 4
    )
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.tokens_BS.shape == batch.labels_BS.shape == (4, 16)
    torch.testing.assert_close(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert batch.positions_BS is None
    assert batch.documents_BS is None


def test_the_seed_decides_the_order_of_training_but_not_of_validation(config) -> None:
    other = replace(config, training=replace(config.training, seed=1), data=replace(config.data, document_mask=False))
    config = replace(config, data=other.data)
    one, two = (Loader(c, build_corpus(c)).next_batch(0, 4) for c in (config, other))
    assert not torch.equal(one.tokens_BS, two.tokens_BS)
    if config.data.corpus != "random":  # its validation tokens themselves come from the seed
        one, two = (Loader(c, build_corpus(c), "validation").next_batch(0, 4) for c in (config, other))
        assert_equal(one, two)


def epoch_windows(config, corpus, epochs: int) -> list[list[bytes]]:
    loader = Loader(config, corpus)
    size = loader.windows.num_windows
    windows: list[bytes] = []
    while len(windows) < epochs * size:
        batch = loader.next_batch(0, config.training.global_batch_size)
        windows += [t.numpy().tobytes() for t in torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)]
    return [windows[e * size : (e + 1) * size] for e in range(epochs)]


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(make_config, tmp_path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(257, size=5000))
    config = make_config(corpus="tokens", path=str(tmp_path / "ids.npy"))
    first, second, third = epoch_windows(config, build_corpus(config), 3)
    assert len(set(first)) == len(first)
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first


def test_windows_share_one_token_so_that_each_is_a_target(make_config, tmp_path) -> None:
    np.save(tmp_path / "train.npy", np.arange(100, 201))
    np.save(tmp_path / "held.npy", np.arange(100, 201))
    config = make_config(
        corpus="tokens",
        path=str(tmp_path / "train.npy"),
        validation_path=str(tmp_path / "held.npy"),
        seq_len=10,
        global_batch_size=10,
    )
    batch = Loader(config, build_corpus(config)).next_batch(0, 10)
    assert sorted(batch.labels_BS.flatten().tolist()) == list(range(101, 201))
    assert sorted(batch.tokens_BS.flatten().tolist()) == list(range(100, 200))


def test_document_mask_counts_ids_and_positions_and_ignores_the_end_tokens_label() -> None:
    end = 256
    window = np.array([[7, 8, end, 9, end, end, 5, 6], [1, 2, 3, 4, 5, 6, 7, end]])
    batch = build_batch(window, end)
    assert batch.tokens_BS.tolist() == window[:, :-1].tolist()
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 0, 0], list(range(7))]
    assert batch.labels_BS.tolist() == [[8, end, -100, end, -100, -100, 6], [2, 3, 4, 5, 6, 7, end]]
    plain = build_batch(window, None)
    assert plain.labels_BS.tolist() == window[:, 1:].tolist()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_corpus_below_one_global_batch_is_refused(make_config, tmp_path, split: str) -> None:
    (tmp_path / "a.txt").write_text("x" * 63)  # with the end token 64 tokens, one short of 4 windows of 16
    (tmp_path / "b.txt").write_text("x" * 64)
    small, enough = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    for train, validation in ((small, enough), (enough, small)):
        config = make_config(corpus="files", path=train, validation_path=validation)
        corpus = build_corpus(config)
        if (train == small) == (split == "train"):
            with pytest.raises(ConfigError, match=rf"(?s){split} split .*global_batch_size = 4.*64 tokens, 3 such"):
                Loader(config, corpus, split)
        else:
            assert Loader(config, corpus, split).next_batch(0, 4).tokens_BS.shape == (4, 16)


def test_a_stream_below_one_global_batch_is_refused(make_config, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 63 + '"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "held out"}\n')
    path = str(tmp_path / "a.jsonl")
    config = make_config(corpus="datasets", path=path, validation_path=str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match=r"(?s)train split .*65 tokens.* has 64"):
        Loader(config, build_corpus(config))
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 64 + '"}\n')
    assert Loader(config, build_corpus(config)).next_batch(0, 4).tokens_BS.shape == (4, 16)


def test_sequences_beyond_the_global_batch_are_refused(make_config, text_files) -> None:
    config = make_config(corpus="files", path=str(text_files))
    loader = Loader(config, build_corpus(config))
    with pytest.raises(ValueError, match=r"\[2, 5\)"):
        loader.next_batch(2, 5)
    assert loader.next_batch(2, 2).tokens_BS.shape == (0, 16)
