"""Records that hold no text: told with file and line, skipped up to a share."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import build_corpus, describe, pack


def write_records(path: Path, bad: str) -> None:
    """200 lines, of which line 151 is ``bad``."""
    good = [json.dumps({"text": f"record {i}"}) for i in range(200)]
    good[150] = bad
    path.write_text("\n".join(good) + "\n")


@pytest.mark.parametrize("corpus", ["files", "datasets"])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"text": "cut', r"no JSON object \(Unterminated string"),
        ('{"text": null}', "holds null"),
        ("7", "the record is int"),
        ('{"body": "x"}', r"has text in \['body'\]"),
    ],
)
def test_a_bad_line_is_told_by_its_number(make_config, tmp_path: Path, corpus: str, bad: str, why: str) -> None:
    """Line 151 was told as 'line 1', and no share of bad lines was ever allowed."""
    write_records(tmp_path / "a.jsonl", bad)
    config = make_config(corpus=corpus, path=str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=rf"(?s)a\.jsonl:151: .*{why}.*data\.max_bad_records"):
        list(build_corpus(config).documents("train"))
    config = make_config(corpus=corpus, path=str(tmp_path / "a.jsonl"), max_bad_records=0.005)
    read = [d for split in ("train", "validation") for d in build_corpus(config).documents(split)]
    assert len(read) == 199
    config = make_config(corpus=corpus, path=str(tmp_path / "a.jsonl"), max_bad_records=0.004)
    with pytest.raises(ConfigError, match=r"1 of 200 are bad"):
        list(build_corpus(config).documents("train"))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("corpus", ["files", "datasets"])
def test_a_null_in_a_table_is_told_by_its_row(make_config, tmp_path: Path, kind: str, corpus: str) -> None:
    """It ended the run after 3,095 documents, again at each resume, with a remedy of an empty list."""
    texts: list[str | None] = [f"row {i}" for i in range(1, 4001)]
    texts[3499] = None
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    else:
        path.write_text("n,text\n" + "".join(f"{i},{t or ''}\n" for i, t in enumerate(texts)))
    with pytest.raises(ConfigError, match=rf"a\.{kind}:3500: "):
        list(build_corpus(make_config(corpus=corpus, path=str(path))).documents("train"))
    built = build_corpus(make_config(corpus=corpus, path=str(path), max_bad_records=0.001))
    assert len([d for split in ("train", "validation") for d in built.documents(split)]) == 3999


@pytest.mark.parametrize("corpus", ["files", "datasets"])
def test_a_lone_surrogate_becomes_a_replacement_character(make_config, tmp_path: Path, corpus: str) -> None:
    """It was a raw UnicodeEncodeError without file or line."""
    write_records(tmp_path / "a.jsonl", r'{"text": "x \ud83d y \ud83d\ude00"}')
    built = build_corpus(make_config(corpus=corpus, path=str(tmp_path / "a.jsonl")))
    read = [d for split in ("train", "validation") for d in built.documents(split)]
    assert "x � y 😀" in read
    assert len(read) == 200


def test_a_surrogate_from_a_corpus_of_ones_own_is_encoded_too() -> None:
    from moe_dtensor.data import build_tokenizer

    ids = pack.join_documents(["a\udc00"], build_tokenizer("bytes"), pack.token_dtype(257))
    assert bytes(ids[:-1].tolist()).decode() == "a�"


def test_skipped_records_are_told_at_the_start(make_config, tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", "{")
    config = make_config(corpus="files", path=str(tmp_path / "a.jsonl"), max_bad_records=0.1)
    for _ in range(2):  # made, then from the cache
        assert "1 bad records skipped" in describe(config, build_corpus(config))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{oops", r"tokenizer_config\.json' must be a JSON object"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json' must be a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', r"must be a text; it is 3"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', r"names the eos_token '<none>', which .* does not have"),
        ("special_tokens_map.json", '{"eos_token": {"content": "<none>"}}', r"names the eos_token '<none>'"),
    ],
)
def test_settings_of_a_tokenizer_that_do_not_fit_are_refused(
    make_config, tokenizer_file: Path, file: str, content: str, message: str
) -> None:
    """A broken file was a traceback, an eos_token that is missing fell back to another."""
    tokenizer_file.with_name(file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_corpus(make_config(tokenizer=str(tokenizer_file)))


def test_a_text_that_the_tokenizer_cannot_encode_is_a_sentence(make_config, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>")).save(str(path))
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    config = make_config(corpus="files", path=str(tmp_path / "a.jsonl"), tokenizer=str(path))
    with pytest.raises(ConfigError, match="cannot encode a text"):
        build_corpus(config).fingerprint()
