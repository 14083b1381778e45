"""Files are read by what they hold; what is left out is told, what contradicts itself refused."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus, describe


def lines(first: int, count: int) -> str:
    return "".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(first, first + count))


def all_documents(corpus) -> list[str]:
    return sorted([*corpus.documents("train"), *corpus.documents("validation")])


def write_every_format(folder: Path) -> list[str]:
    """Twelve files of ten records each, every format and spelling; returns the texts."""
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(0, 10))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(10, 10).encode()))
    (folder / "c.json").write_text(json.dumps([{"text": f"record {i}"} for i in range(20, 30)], indent=1))
    (folder / "d.JSONL").write_text(lines(30, 10))
    (folder / "e.ndjson").write_text(lines(40, 10))
    with pyarrow.CompressedOutputStream(str(folder / "f.jsonl.zst"), "zstd") as file:
        file.write(lines(50, 10).encode())
    (folder / "g.jsonl.xz").write_bytes(lzma.compress(lines(60, 10).encode()))
    table = pyarrow.table({"n": list(range(70, 80)), "text": [f"record {i}" for i in range(70, 80)]})
    pyarrow.parquet.write_table(table, folder / "h.parquet")
    with pyarrow.ipc.new_file(folder / "i.arrow", table.schema) as file:
        file.write(table.set_column(1, "text", [[f"record {i}" for i in range(80, 90)]]))
    with pyarrow.ipc.new_stream(folder / "j.arrow", table.schema) as file:
        file.write(table.set_column(1, "text", [[f"record {i}" for i in range(90, 100)]]))
    (folder / "k.csv").write_text("n,text\n" + "".join(f'{i},"record {i}"\n' for i in range(100, 110)))
    (folder / "l.data").write_text(lines(110, 10))
    return sorted(f"record {i}" for i in range(110))


@pytest.mark.parametrize("corpus", ["files", "datasets"])
def test_a_folder_of_every_format_is_read_whole(make_config, tmp_path: Path, corpus: str) -> None:
    """Of a.jsonl, b.jsonl.gz, c.json, d.JSONL and e.ndjson 40 of 180 documents were used, in silence."""
    texts = write_every_format(tmp_path / "folder")
    found = all_documents(build_corpus(make_config(corpus=corpus, path=str(tmp_path / "folder"))))
    # l.data is JSON lines by content: a folder's plain text is taken by name alone, its records by content.
    assert found == sorted([*texts, *(f"record {i}" for i in range(110, 120))])


def test_json_lines_named_by_themselves_are_no_single_document(make_config, tmp_path: Path) -> None:
    for name in ("d.JSONL", "x.txt", "noname"):
        (tmp_path / name).write_text(lines(0, 40))
        assert len(all_documents(build_corpus(make_config(corpus="files", path=str(tmp_path / name))))) == 40


def test_the_start_tells_files_documents_tokens_and_what_was_left_out(make_config, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_every_format(folder)
    (folder / "README.md").write_text("not a document")
    (folder / "empty.txt").write_text("")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\x00\x01")
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    config = make_config(corpus="files", path=str(folder))
    corpus = build_corpus(config)
    told = describe(config, corpus)
    train = list(corpus.documents("train"))
    tokens = sum(len(text) + 1 for text in train)
    assert f"train: {len(train)} documents, {tokens:,} tokens" in told
    assert "12 files (2 arrow; 1 csv; 1 json; 4 jsonl; 1 jsonl, gzip; 1 jsonl, xz; 1 jsonl, zstd; 1 parquet)" in told
    assert "left out 4: " in told
    assert "README.md (its name is not one of data" in told
    assert "photo.jpg (not text" in told
    assert "link.jsonl (the same file as a.jsonl)" in told
    assert "end token (id 256)" in told


@pytest.mark.parametrize("corpus", ["files", "datasets"])
def test_validation_files_that_are_also_for_training_are_refused(make_config, tmp_path: Path, corpus: str) -> None:
    """The loss was printed as if held out."""
    (tmp_path / "a.jsonl").write_text(lines(0, 40))
    (tmp_path / "b.jsonl").write_text(lines(40, 10))
    os.link(tmp_path / "b.jsonl", tmp_path / "other_name.jsonl")
    for held_out in ("b.jsonl", "other_name.jsonl"):
        path = str(tmp_path if corpus == "datasets" else tmp_path / "[ab].jsonl")
        config = make_config(corpus=corpus, path=path, validation_path=str(tmp_path / held_out))
        with pytest.raises(ConfigError, match=r"(?s)hold out what data\.path does not train on.*b\.jsonl"):
            build_corpus(config)
    config = make_config(corpus=corpus, path=str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "b.jsonl"))
    assert len(list(build_corpus(config).documents("validation"))) == 10


def test_a_runs_folder_inside_the_data_is_never_input(make_config, tmp_path: Path) -> None:
    """Its metrics became corpus, and the run could no longer resume."""
    from dataclasses import replace

    from moe_dtensor.config.schema import Run

    (tmp_path / "a.jsonl").write_text(lines(0, 40))
    config = make_config(corpus="files", path=str(tmp_path))
    config = replace(config, run=Run(folder=str(tmp_path / "outputs" / "mine")))
    before = build_corpus(config).fingerprint()
    for folder in ("mine", "another"):
        (tmp_path / "outputs" / folder).mkdir(parents=True)
        (tmp_path / "outputs" / folder / "metrics.jsonl").write_text('{"step": 1, "text": "no document"}\n')
    (tmp_path / "outputs" / "another" / "run.json").write_text('{"run_id": "1"}')
    for corpus in ("files", "datasets"):
        own = build_corpus(replace(config, data=replace(config.data, corpus=corpus)))
        assert len(all_documents(own)) == 40
    assert build_corpus(config).fingerprint() == before
    assert "written by a run" in describe(config, build_corpus(config))
    with pytest.raises(ConfigError, match="written by a run"):
        build_corpus(replace(config, data=replace(config.data, path=str(tmp_path / "outputs/another/metrics.jsonl"))))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.parquet"])
def test_a_file_that_was_cut_is_named(make_config, tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i}" * 50 for i in range(999)]}), tmp_path / name)
    else:
        text = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(2000)).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else lzma.compress(text))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    config = make_config(corpus="files", path=str(tmp_path / name))
    with pytest.raises(ConfigError, match=rf"(?s){name}.*cannot be read to its end"):
        list(build_corpus(config).documents("train"))


def test_tables_without_the_column_name_those_they_have(make_config, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    config = make_config(corpus="files", path=str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=r"data\.text_key.*a\.parquet' has no 'text', but \['body'\]"):
        list(build_corpus(config).documents("train"))


def test_a_stream_of_several_formats_goes_on_where_it_was(make_config, tmp_path: Path) -> None:
    write_every_format(tmp_path / "folder")
    config = make_config(corpus="datasets", path=str(tmp_path / "folder"))
    documents = build_corpus(config).documents("train")
    whole = list(build_corpus(config).documents("train"))
    for count in range(len(whole)):
        resumed = build_corpus(config).documents("train") if count % 9 == 0 else None
        if resumed:
            resumed.load_state_dict(json.loads(json.dumps(documents.state_dict())))
            assert list(resumed) == whole[count:]
        next(documents)
    assert Loader(config, build_corpus(config)).next_batch(0, 4).tokens_BS.shape == (4, 16)


def test_a_place_that_the_datasets_library_wrote_is_understood(make_config, tmp_path: Path) -> None:
    """Checkpoints of runs that read local files through the library go on with the same records."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    for shard in range(3):
        (folder / f"{shard}.jsonl").write_text(lines(100 * shard, 50))
    library = datasets.load_dataset(str(folder), split="train", streaming=True)
    records = iter(library)
    for _ in range(72):
        next(records)
    documents = build_corpus(make_config(corpus="datasets", path=str(folder), validation_path=None)).documents("train")
    documents.split = None
    documents.load_state_dict(library.state_dict())
    assert list(documents) == [record["text"] for record in records]


def test_a_release_that_loses_its_place_is_refused(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets 5.0.0 restarts a stream at its second resume: 267 of 400 batches were wrong."""
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.0")
    with pytest.raises(ConfigError, match=r"datasets 5\.0\.0 cannot be used"):
        build_corpus(make_config(corpus="datasets", path="some/name")).documents("train")
