"""Conversations: the assistant's tokens are the targets, whole conversations share sequences and see nothing of each
other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config, Source, Stage
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.loader import IGNORED, Batch
from moe_dtensor.verbs import tokenize
from tests.data.chat_templates import END, TEMPLATES, save_tokenizer
from tests.data.test_assistant import SAID, TALK


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def talks(count: int, longest: int = 6) -> list[dict]:
    """Conversations that are told apart by their number, of some words each."""
    words = np.random.default_rng(0).integers(1, longest, count)
    return [
        {
            "messages": [
                {"role": "user", "content": f"number {i}?"},
                {"role": "assistant", "content": " ".join(["yes", *(str(i * j) for j in range(words[i]))])},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "chatml", "chatml")


@pytest.fixture
def make(make_config, folder: Path, tmp_path: Path):
    """A config that trains on all of some records."""

    def build(records: list[dict], seq_len: int = 64, global_batch_size: int = 1, **data) -> Config:
        held_out = write(tmp_path / "held.jsonl", talks(40))
        given = {"tokenizer": str(folder), "validation_path": held_out} | data
        given = {"path": write(tmp_path / "talks.jsonl", records)} | given
        return make_config(seq_len, global_batch_size, corpus="conversations", **given)

    return build


def an_epoch(config: Config) -> tuple[Loader, Iterator[Batch]]:
    loader = Loader(config, build_corpus(config))
    return loader, (loader.next_batch(0, 1) for _ in range(loader.windows.num_windows))


def pieces(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a batch of one sequence; positions and padding are checked on the way."""
    found = []
    assert batch.padding_B is not None
    length = batch.tokens_BS.shape[1] - int(batch.padding_B[0])
    for number in range(int(batch.documents_BS[0, length - 1]) + 1):
        inside = (batch.documents_BS[0] == number).nonzero().flatten().tolist()
        assert batch.positions_BS[0, inside].tolist() == list(range(len(inside)))
        found.append((batch.tokens_BS[0, inside].tolist(), batch.labels_BS[0, inside].tolist()))
    assert set(batch.labels_BS[0, length:].tolist()) <= {IGNORED}
    assert batch.documents_BS[0, length:].diff().eq(1).all()
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_targets_what_the_assistant_says(make, tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    where = save_tokenizer(tmp_path / "other", name)
    theirs = PreTrainedTokenizerFast.from_pretrained(where)
    config = make([{"messages": TALK}], seq_len=256, tokenizer=str(where), validation_path="")
    config = replace(config, data=replace(config.data, validation_path=config.data.path))
    with pytest.raises(ConfigError, match="both match"):
        build_corpus(config)
    config = replace(config, data=replace(config.data, validation_path=write(tmp_path / "v.jsonl", talks(2))))
    loader, batches = an_epoch(config)
    [(ids, labels)] = pieces(next(batches))
    expected = theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert ids == expected
    assert all(label in (IGNORED, after) for label, after in zip(labels, ids[1:], strict=False))
    assert labels[-1] == IGNORED
    said = "".join(
        loader.tokenizer._library.decode([label], skip_special_tokens=False) if label >= 0 else "\n§"
        for label in labels
    )
    assert [turn for turn in said.split("\n§") if turn] == SAID[name]
    if name == "tagged":
        masks = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert [int(label != IGNORED) for label in labels] == [*masks["assistant_masks"][1:], 0]


def test_each_conversation_comes_once_whole_and_alone(make, folder: Path) -> None:
    loader, batches = an_epoch(make(talks(300, 20), 128))
    said = []
    for batch in batches:
        for ids, labels in pieces(batch):
            targets = [label for label in labels if label != IGNORED]
            # Of a conversation that fills the window the last token is a label alone.
            shifted = zip([*ids[1:], labels[-1]], labels, strict=True)
            assert all(label in (IGNORED, after) for after, label in shifted)
            said.append(loader.tokenizer._library.decode(targets, skip_special_tokens=False))
    assert sorted(said) == sorted(talk["messages"][1]["content"] + "<|im_end|>" for talk in talks(300, 20))
    assert "packing conversations: 300 in" in loader.told()
    assert "0 cut, 0 left out" in loader.told()


def test_shares_of_padding_and_of_trained_tokens_are_told(make) -> None:
    loader, batches = an_epoch(make(talks(300, 20), 128))
    windows = loader.windows
    rows = windows.rows(range(windows.num_windows))
    trained = sum(int((batch.labels_BS != IGNORED).sum()) for batch in batches)
    assert f"{trained / rows.size:.2%} of the tokens trained" in loader.told()
    assert f"{windows.padding / rows.size:.2%} padding" in loader.told()
    assert 0 < windows.padding / rows.size < 0.05


def test_long_conversations_are_refused_cut_or_dropped(make) -> None:
    records = [
        *talks(20),
        {"messages": [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two three " * 40}]},
    ]
    with pytest.raises(ConfigError, match=r"1 of 21 conversations have more than training.seq_len \+ 1 = 65 tokens"):
        an_epoch(make(records))
    loader, batches = an_epoch(make(records, too_long="cut"))
    assert "1 cut, 0 left out" in loader.told()
    longest = max((piece for batch in batches for piece in pieces(batch)), key=lambda piece: len(piece[0]))
    assert len(longest[0]) == 64
    assert longest[1][-1] != IGNORED
    loader, batches = an_epoch(make(records, too_long="drop"))
    assert "0 cut, 1 left out" in loader.told()
    assert len([piece for batch in batches for piece in pieces(batch)]) == 20
    # What is cut so that nothing of the assistant's is left teaches nothing.
    records[-1]["messages"][0]["content"] = "one two three " * 40
    loader, _ = an_epoch(make(records, too_long="cut"))
    assert "0 cut, 1 left out" in loader.told()


def test_what_is_too_long_for_a_later_stage_is_told_at_the_start(make) -> None:
    config = make(talks(20, 12), 96)
    build_corpus(config)
    config = replace(config, stages=(Stage(from_step=2, seq_len=16),))
    with pytest.raises(ConfigError, match=r"training.seq_len \+ 1 = 17"):
        Loader(config, build_corpus(config))


def test_prompt_and_completion(make, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "who?"}
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, asked]
    records = [
        {"prompt": "who?", "completion": "me"},
        {"messages": [asked, {"role": "assistant", "content": "me"}]},
        {"prompt": earlier, "completion": [{"role": "assistant", "content": "me"}]},
    ]
    config = make(records, seq_len=128)
    _, batches = an_epoch(config)
    found = [piece for batch in batches for piece in pieces(batch)]
    assert sorted(map(len, (ids for ids, _ in found)))[0] == sorted(map(len, (ids for ids, _ in found)))[1]
    targets = {tuple(label for label in labels if label != IGNORED) for _, labels in found}
    assert len(targets) == 1, "the earlier turn of a prompt is not trained"
    other = tmp_path / "others.csv"
    other.write_text("prompt,completion\nwho?,me\n")
    _, batches = an_epoch(replace(config, data=replace(config.data, path=str(other))))
    assert pieces(next(batches))[0] in found


BAD = {
    "neither 'messages' nor": {"text": "no"},
    "no list of messages, but a text": {"messages": "hello"},
    "message 2 of 'messages' has no role": {"messages": [TALK[1], {"content": "x"}]},
    "message 2 of 'messages' has no content": {"messages": [TALK[1], {"role": "assistant"}]},
    "the assistant says nothing": {"messages": TALK[:2]},
    "roles must alternate": {"messages": [TALK[1], TALK[1], TALK[2]]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_record_that_is_no_conversation_is_told_with_its_line(make, tmp_path: Path, message: str) -> None:
    where = str(save_tokenizer(tmp_path / "strict", "instructions"))
    good = {"messages": TALK}
    config = make([good, BAD[message], good], seq_len=256, tokenizer=where)
    with pytest.raises(ConfigError, match=f"talks.jsonl:2: .*{message}"):
        an_epoch(config)
    loader, _ = an_epoch(override(config, {"data.max_bad_records": 0.5}))
    assert loader.windows.documents == 2


def test_what_cannot_be_read_as_conversations_is_refused(make, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer of bytes has no chat template"):
        build_corpus(make(talks(3), tokenizer="bytes"))
    (tmp_path / "book.txt").write_text("once\n")
    config = make(talks(3))
    with pytest.raises(ConfigError, match=r"book.txt' is plain text"):
        build_corpus(replace(config, data=replace(config.data, path=str(tmp_path / "book.txt"))))
    with pytest.raises(ConfigError, match="token files do not hold"):
        tokenize.tokenize(build_corpus(config), tmp_path / "out", 1, 1000)


def test_a_template_of_ones_own_and_the_tokenizer_of_bytes(make, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATES["chatml"])
    _, batches = an_epoch(make(talks(3), 256, tokenizer="bytes", chat_template=str(tmp_path / "own.jinja")))
    said = [bytes(x for x in labels if x >= 0).decode() for _, labels in pieces(next(batches))]
    assert sorted(said) == sorted(t["messages"][1]["content"] + "<|im_end|>\n" for t in talks(3))


def test_what_is_cached_follows_the_template(make, folder: Path) -> None:
    config = make(talks(5))
    before = build_corpus(config).fingerprint()
    assert build_corpus(config).fingerprint() == before
    save_tokenizer(folder, "plain")
    assert build_corpus(config).fingerprint() != before


def test_a_resume_sees_the_same_conversations_and_ranks_share_a_batch(make) -> None:
    config = make(talks(200, 12), 96, 4)
    corpus = build_corpus(config)
    loader, other = Loader(config, corpus), Loader(config, corpus)
    for _ in range(7):
        loader.next_batch(0, 4)
    other.load_state_dict(loader.state_dict())
    for _ in range(30):
        whole = loader.next_batch(0, 4)
        state = other.state_dict()
        halves = [other.next_batch(0, 2)]
        other.load_state_dict(state)
        halves.append(other.next_batch(2, 4))
        for field in ("tokens_BS", "labels_BS", "positions_BS", "documents_BS", "padding_B"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(half, field) for half in halves]))


def test_beside_plain_text_as_one_of_several_sources(make, folder: Path, tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}: " + "words " * 10)
    talk = make(talks(60)).data.path
    sources = (
        Source(name="talk", corpus="conversations", path=talk, weight=1.0),
        Source(name="text", path=str(tmp_path / "*.txt"), weight=1.0),
    )
    config = make(talks(60), global_batch_size=8, validation_path="", path="", sources=sources, too_long="cut")
    config = replace(config, stages=(Stage(from_step=3, seq_len=32, keep_batch_tokens=True),))
    check(config, 1)
    assert resolve(config, 1).data.document_mask
    loader = Loader(resolve(config, 1), build_corpus(config))
    for _ in range(4):
        batch = loader.next_batch(0, loader.batch_size)
        assert batch.source_B is not None
        plain = batch.source_B == 1
        share = (batch.labels_BS != IGNORED).double().mean(1)
        assert (share[plain] > 0.9).all()
        assert (share[~plain] < 0.9).all()
        ends = batch.tokens_BS[plain] == loader.tokenizer.end_id
        assert (batch.positions_BS[plain][:, 1:][ends[:, :-1]] == 0).all()
    assert batch.tokens_BS.shape == (16, 32)
    assert END["chatml"] == "<|im_end|>"
