"""The corpora of text files: which documents, which split, which errors."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import build_corpus


def both(corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("validation"))


def test_stdlib_is_its_own_sources_split_by_file(make_config) -> None:
    corpus = build_corpus(make_config())
    names = [name for name, _ in corpus.files]
    assert names == sorted(names)
    assert {"json/decoder.py", "inspect.py"} <= set(names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    train, validation = both(corpus)
    assert 0.03 < len(validation) / (len(train) + len(validation)) < 0.08
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "json/decoder.py").read_text() in train + validation
    assert len(train) + len(validation) >= len(names) - 10  # all but a few that are not UTF-8


def test_stdlib_split_depends_on_the_path_alone(make_config, monkeypatch, tmp_path: Path) -> None:
    root = tmp_path / "lib"
    for i in range(60):
        (root / f"package{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"package{i % 3}" / f"m{i}.py").write_text(f"x = {i}\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "installed.py").write_text("installed")
    (root / "package0" / "bad.py").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    train, validation = both(build_corpus(make_config()))
    assert sorted(train + validation) == sorted(f"x = {i}\n" for i in range(60))
    assert 0 < len(validation) < 12
    (root / "another.py").write_text("new")
    for text, name in (("x = 0\n", "m0"), (validation[0], "")):  # edits move no file across
        assert text in (train + validation), name
    again = both(build_corpus(make_config()))
    assert set(train) <= set(again[0])
    assert set(validation) <= set(again[1])


def test_stdlib_is_tokenised_again_when_a_file_changes(make_config, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    for i in range(3):
        (tmp_path / "lib" / f"m{i}.py").write_text("x = 1\n")
    before = build_corpus(make_config()).fingerprint()
    for i in range(3):
        (tmp_path / "lib" / f"m{i}.py").write_text("x = 2\n")  # the same size
        os.utime(tmp_path / "lib" / f"m{i}.py", ns=(10**18, 10**18 + i))
    assert build_corpus(make_config()).fingerprint() != before


def test_stdlib_without_sources_is_refused(make_config, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"(?s)stdlib.*data\.corpus = 'files'"):
        build_corpus(make_config())


def test_files_by_glob_folder_and_path_agree(make_config, text_files: Path) -> None:
    by_folder = both(build_corpus(make_config(corpus="files", path=str(text_files))))
    by_glob = both(build_corpus(make_config(corpus="files", path=f"{text_files}/*.txt")))
    assert by_folder == by_glob
    train, validation = by_folder
    texts = [f.read_text() for f in sorted(text_files.iterdir())]
    assert sorted(train + validation) == sorted(texts)
    assert 0 < len(validation) < 10
    one = both(build_corpus(make_config(corpus="files", path=str(text_files / "03.txt"))))
    assert "".join(one[0] + one[1]) == texts[3]


def test_few_text_files_hold_out_their_tails(make_config, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.md").write_text(text)
    train, validation = both(build_corpus(make_config(corpus="files", path=str(tmp_path / "book.md"))))
    assert train[0] + validation[0] == text
    assert 0.03 < len(validation[0]) / len(text) <= 0.05
    assert train[0].endswith("\n")


def test_jsonl_takes_the_text_key(make_config, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    lines = [json.dumps({"body": t, "n": 1}) for t in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:50]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[50:]))
    config = make_config(corpus="files", path=str(tmp_path), text_key="body")
    train, validation = both(build_corpus(config))
    assert sorted(train + validation) == sorted(texts)
    assert 0 < len(validation) < 15
    (tmp_path / "b.jsonl").rename(tmp_path / "0.jsonl")  # another order, the same split
    moved = both(build_corpus(config))
    assert (set(moved[0]), set(moved[1])) == (set(train), set(validation))
    assert moved[0] != train


def test_validation_files_leave_all_of_path_to_training(make_config, text_files: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    config = make_config(corpus="files", path=str(text_files), validation_path=str(tmp_path / "held.txt"))
    train, validation = both(build_corpus(config))
    assert len(train) == 40
    assert validation == ["held out"]


def test_fingerprint_follows_the_content_not_the_place(make_config, text_files: Path, tmp_path: Path) -> None:
    first = build_corpus(make_config(corpus="files", path=str(text_files))).fingerprint()
    moved = text_files.rename(tmp_path / "moved")
    assert build_corpus(make_config(corpus="files", path=str(moved))).fingerprint() == first
    file = moved / "00.txt"
    stat = file.stat()
    file.write_text(file.read_text().replace("file", "FILE"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size, a clock tick later
    assert build_corpus(make_config(corpus="files", path=str(moved))).fingerprint() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"other": "x"}\n', r"(?s)a\.jsonl:1: data\.text_key.*'text'.*\['other'\]"),
        ("a.jsonl", b'{"text": 3}\n', r"data\.text_key"),
        ("a.jsonl", b'["text"]\n', r"data\.text_key"),
        ("a.jsonl", b"{oops\n", r"a\.jsonl:1: the line is no JSON object"),
        ("a.txt", b"\xff\xfe", r"a\.txt:1: text files must be UTF-8"),
    ],
    ids=["no key", "not text", "not an object", "not json", "not utf-8"],
)
def test_broken_files_are_named(make_config, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = build_corpus(make_config(corpus="files", path=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=message):
        list(corpus.documents("train"))


@pytest.mark.parametrize("key", ["path", "validation_path"])
def test_a_glob_without_a_match_is_named(make_config, text_files: Path, key: str) -> None:
    paths = {"path": str(text_files), key: "nowhere/*.txt"}
    with pytest.raises(ConfigError, match=rf"data\.{key} .*'nowhere/\*\.txt' matches no file"):
        build_corpus(make_config(corpus="files", **paths))
