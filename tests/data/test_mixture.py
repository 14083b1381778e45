"""Several sources: shares, order, restarts, stages; whose turn it is, for any place at once."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data, Source, Stage, Training
from moe_dtensor.data import Loader, build_corpus, describe
from moe_dtensor.data.mixture import Turns, whole_weights

WEIGHTS = {"web": 0.617, "code": 0.25, "books": 0.133}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three sources of ids that tell the source: 0 to 49, 50 to 99, 100 to 149."""
    sources = []
    for i, (name, weight) in enumerate(WEIGHTS.items()):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(i).integers(50 * i, 50 * i + 50, size=2000))
        sources.append(Source(name, "tokens", str(tmp_path / f"{name}.npy"), weight=weight))
    training = Training(steps=10_000, seq_len=8, global_batch_size=6)
    return Config(data=Data(sources=tuple(sources)), training=training)


def sources_of(batch) -> list[int]:
    """Told by the ids themselves."""
    found = batch.tokens_BS // 50
    assert (found == found[:, :1]).all()
    assert found[:, 0].tolist() == batch.source_B.tolist()
    return found[:, 0].tolist()


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_counts_are_the_weights_to_one_window_after_every_step(config: Config, steps: int) -> None:
    """Bit for bit after kills, and however a batch is cut over ranks: 1, 2, 3 or 6 of them, or another number each
    time."""
    corpus = build_corpus(config)
    whole = Loader(config, corpus)
    generator = np.random.default_rng(0)
    cut, size = Loader(config, corpus), 6
    counts = np.zeros(3)
    for step in range(1, steps + 1):
        batch = whole.next_batch(0, 6)
        counts += np.bincount(batch.source_B, minlength=3)
        assert (np.abs(counts - np.array(list(WEIGHTS.values())) * 6 * step) < 1).all()
        if step % 97 == 0:
            sources_of(batch)
        if generator.random() < 0.01:  # killed, and resumed on another mesh
            state = json.loads(json.dumps(cut.state_dict()))
            cut, size = Loader(config, corpus), int(generator.choice([1, 2, 3, 6]))
            cut.load_state_dict(state)
        rank = int(generator.integers(6 // size))
        part = cut.next_batch(rank * size, (rank + 1) * size)
        assert torch.equal(part.tokens_BS, batch.tokens_BS[rank * size : (rank + 1) * size])
    assert whole.tokens_by_source() == {n: int(c) * 8 for n, c in zip(WEIGHTS, counts, strict=True)}
    assert cut.state_dict() == whole.state_dict()


def test_an_epoch_of_a_source_has_each_of_its_windows_once(config: Config) -> None:
    loader = Loader(config, build_corpus(config))
    seen: list[list[bytes]] = [[], [], []]
    for _ in range(1500):
        batch = loader.next_batch(0, 6)
        for source, tokens in zip(batch.source_B.tolist(), batch.tokens_BS, strict=True):
            seen[source].append(tokens.numpy().tobytes())
    for windows in seen:
        size = 1900 // 8  # a twentieth is held out
        first, second = windows[:size], windows[size : 2 * size]
        assert len(set(first)) == size
        assert sorted(first) == sorted(second)
        assert first != second


def test_epochs_at_most_is_kept_before_the_first_step(config: Config) -> None:
    sources = tuple(replace(s, epochs=2.0) if s.name == "code" else s for s in config.data.sources)
    config = replace(config, data=replace(config.data, sources=sources))
    with pytest.raises(ConfigError, match=r"data\.sources\.code: the run would read its train split 63\.\d\d times"):
        Loader(config, build_corpus(config))
    config = replace(config, training=replace(config.training, steps=300))
    Loader(config, build_corpus(config))


def test_a_streamed_source_ends_after_its_epochs(config: Config, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": f"document {i}" * 9}) + "\n" for i in range(200)))
    streamed = Source("streamed", "datasets", str(tmp_path / "s.jsonl"), weight=0.5, epochs=1.0)
    config = replace(config, data=replace(config.data, sources=(*config.data.sources, streamed)))
    loader = Loader(config, build_corpus(config))

    def read_on() -> None:
        for _ in range(3000):
            loader.next_batch(0, 6)

    with pytest.raises(ConfigError, match=r"data\.sources\.streamed\.epochs"):
        read_on()


def with_stages(config: Config) -> Config:
    stages = (
        Stage(from_step=20, weights=(("web", 0.5), ("code", 0.5))),
        Stage(from_step=30, seq_len=16, keep_batch_tokens=True),
        Stage(from_step=40, lr=1e-5),
        Stage(from_step=50, seq_len=8, global_batch_size=6, weights=(("books", 1.0),)),
    )
    return replace(config, stages=stages, training=replace(config.training, steps=60))


@pytest.mark.parametrize("kind", ["mixture", "with a stream", "one array", "one stream"])
def test_stages_change_weights_and_lengths_and_resume_at_their_borders(
    config: Config, tmp_path: Path, kind: str
) -> None:
    config = with_stages(config)
    lines = "".join(json.dumps({"text": f"document {i} " * 40}) + "\n" for i in range(300))
    (tmp_path / "s.jsonl").write_text(lines)
    if kind == "with a stream":
        streamed = Source("code", "datasets", str(tmp_path / "s.jsonl"), weight=0.25)
        sources = tuple(streamed if s.name == "code" else s for s in config.data.sources)
        config = replace(config, data=replace(config.data, sources=sources))
    elif kind.startswith("one"):
        corpus, path = ("tokens", "web.npy") if kind == "one array" else ("datasets", "s.jsonl")
        stages = tuple(replace(stage, weights=()) for stage in config.stages)
        config = replace(config, data=Data(corpus=corpus, path=str(tmp_path / path)), stages=stages)
    corpus = build_corpus(config)
    loader = Loader(config, corpus)
    states, batches = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.next_batch(0, loader.batch_size))
    assert [tuple(b.tokens_BS.shape) for b in batches] == [(6, 8)] * 29 + [(3, 16)] * 20 + [(6, 8)] * 11
    if kind == "mixture":
        assert {s for b in batches[19:49] for s in sources_of(b)} == {0, 1}
        assert {s for b in batches[49:] for s in sources_of(b)} == {2}
    for border in (20, 30, 40, 50):
        for step in (border - 2, border - 1, border):  # states[step] is taken after that many steps
            resumed = Loader(config, build_corpus(config))
            resumed.load_state_dict(states[step])
            for batch in batches[step : step + 15]:
                assert torch.equal(resumed.next_batch(0, resumed.batch_size).tokens_BS, batch.tokens_BS)


def test_tokens_instead_of_a_weight(config: Config) -> None:
    whole = config.training.steps * 6 * 8
    web, code, books = config.data.sources
    sources = (replace(web, weight=0.0, tokens=whole // 4), code, books)
    loader = Loader(
        replace(config, data=Data(sources=sources)), build_corpus(replace(config, data=Data(sources=sources)))
    )
    for _ in range(1000):
        loader.next_batch(0, 6)
    read = loader.tokens_by_source()
    assert abs(read["web"] - 48_000 / 4) <= 8
    assert abs(read["code"] / read["books"] - 0.25 / 0.133) < 0.01


def test_each_source_has_its_line_at_the_start(config: Config) -> None:
    told = describe(config, build_corpus(config)).split("\n")
    assert [line.split(":")[1].strip() for line in told] == list(WEIGHTS)
    assert all("1,900 tokens" in line for line in told)


def test_what_one_source_holds_out_no_other_may_train_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' * 50)
    sources = (
        Source("one", "files", str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "b.jsonl"), weight=1.0),
        Source("two", "files", str(tmp_path / "b.jsonl"), weight=1.0),
    )
    with pytest.raises(ConfigError, match=r"both match .*b\.jsonl"):
        build_corpus(Config(data=Data(sources=sources)))


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_met_to_one_turn_after_every_turn(seed: int) -> None:
    generator = random.Random(seed)
    weights = [generator.choice([0, 1, 2, 3, 50, 1000, generator.randint(1, 10**5)]) for _ in range(2 + seed % 8)]
    weights[0] = 700
    turns = Turns(weights)
    for place in range(1, 2000):
        [(source, _)] = turns.take(1)
        assert weights[source] > 0
        assert sum(turns.counts) == place
        assert all(abs(c - w * place / turns.total) < 1 for c, w in zip(turns.counts, weights, strict=True))
        if place % 11 == 0:
            assert turns.counts_at(place) == turns.counts


def test_turns_are_numbered_and_go_on_from_any_place() -> None:
    turns = Turns(whole_weights([0.7, 0.2, 0.1]))
    taken = turns.take(500)
    for source in range(3):
        assert [n for s, n in taken if s == source] == list(range(turns.counts[source]))
    for place in (0, 1, 9, 10, 11, 377):
        again = Turns(whole_weights([0.7, 0.2, 0.1]))
        again.seek(place)
        assert again.take(50) == [*taken, *turns.take(50)][place : place + 50]


def test_weights_are_whole_numbers_of_their_decimals() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([3.0, 0.0, 6.0]) == [1, 0, 2]
    long = whole_weights([0.123456789012, 0.876543210988])
    assert abs(long[0] / sum(long) - 0.123456789012) < 2**-29


def test_a_place_in_a_trillion_is_found_at_once() -> None:
    turns = Turns(whole_weights([0.7, 0.2, 0.05, 0.04999, 0.00001]))
    start = time.process_time()
    turns.seek(10**12 + 12345)
    taken = time.process_time() - start
    assert taken < 0.05
    assert sum(turns.counts) == 10**12 + 12345
    assert abs(turns.counts[3] - 0.04999 * (10**12 + 12345)) < 1
