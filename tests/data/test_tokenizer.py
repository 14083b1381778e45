"""Tokenizers: bytes, and a tokenizer.json trained here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import tokenizer as module
from moe_dtensor.data.tokenizer import HuggingFaceTokenizer, build_tokenizer


def test_bytes_are_utf8_values_and_come_back() -> None:
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode_batch(["né", b"\xff"])
    assert [i.tolist() for i in ids] == [[110, 0xC3, 0xA9], [255]]
    assert tokenizer.decode([*ids[0], tokenizer.end_id]) == "né"
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)


def test_a_tokenizer_file_encodes_as_the_library_and_comes_back(tokenizer_file: Path) -> None:
    library = Tokenizer.from_file(str(tokenizer_file))
    texts = ["the cat", "", "a dog — né"]
    for path in (tokenizer_file, tokenizer_file.parent):
        tokenizer = build_tokenizer(str(path))
        ids = tokenizer.encode_batch(texts)
        assert [i.tolist() for i in ids] == [library.encode(t).ids for t in texts]
        assert [tokenizer.decode(i) for i in ids] == texts
        assert len(ids[0]) < len("the cat")  # merges are used
        assert tokenizer.vocab_size == library.get_vocab_size()
        assert tokenizer.end_id == library.token_to_id("<|endoftext|>")


def test_no_begin_token_from_the_post_processor(tokenizer_file: Path) -> None:
    library = Tokenizer.from_file(str(tokenizer_file))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(2)
    library.save(str(tokenizer_file))
    text = "the cat sat on the mat"
    assert library.encode(text).ids[0] == 0
    ids = build_tokenizer(str(tokenizer_file)).encode_batch([text])[0]
    assert 0 not in ids
    assert build_tokenizer(str(tokenizer_file)).decode(ids) == text  # nor is it truncated


def test_text_that_spells_the_end_token_becomes_it(tokenizer_file: Path) -> None:
    tokenizer = build_tokenizer(str(tokenizer_file))
    assert tokenizer.end_id in tokenizer.encode_batch(["one<|endoftext|>two"])[0]


def test_the_end_token_named_by_the_config_wins(tokenizer_file: Path) -> None:
    beside = tokenizer_file.with_name("tokenizer_config.json")
    beside.write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    tokenizer = build_tokenizer(str(tokenizer_file))
    assert tokenizer.end_id == 0
    beside.unlink()
    assert build_tokenizer(str(tokenizer_file)).fingerprint() != tokenizer.fingerprint()


def test_holes_in_the_ids_count_into_the_vocabulary(tokenizer_file: Path) -> None:
    content = json.loads(tokenizer_file.read_text())
    for added in content["added_tokens"]:
        if added["content"] == "<|endoftext|>":
            added["id"] = 1000
    content["model"]["vocab"]["<|endoftext|>"] = 1000
    tokenizer_file.write_text(json.dumps(content))
    tokenizer = build_tokenizer(str(tokenizer_file))
    assert (tokenizer.end_id, tokenizer.vocab_size) == (1000, 1001)


def test_long_texts_are_cut_at_line_ends(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat\nsat on the mat\n" + "x" * 50 + "\n\nend"
    tokenizer = build_tokenizer(str(tokenizer_file))
    whole = tokenizer.encode_batch([text, "the cat"])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20)
    pieces = list(module.cut_in_pieces(text))
    assert "".join(pieces) == text
    assert pieces[0] == "the cat\n"
    assert max(map(len, pieces)) <= 20
    cut = tokenizer.encode_batch([text, "the cat"])
    assert tokenizer.decode(cut[0]) == text
    np.testing.assert_array_equal(cut[1], whole[1])


@pytest.mark.parametrize("content", [None, "{}"], ids=["absent", "broken"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*tokenizer\.json"):
        build_tokenizer(str(path))


def test_a_missing_end_token_is_named_with_the_remedy(tokenizer_file: Path) -> None:
    tokenizer_file.write_text(tokenizer_file.read_text().replace("<|endoftext|>", "<other>"))
    with pytest.raises(ConfigError, match=r"(?s)end token.*tokenizer_config\.json"):
        HuggingFaceTokenizer(str(tokenizer_file))
    tokenizer_file.with_name("tokenizer_config.json").write_text('{"eos_token": "<other>"}')
    assert HuggingFaceTokenizer(str(tokenizer_file)).end_id == 1
