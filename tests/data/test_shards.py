"""The verb tokenize: sharded files, the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data import Loader, build_corpus, shards
from moe_dtensor.data.pack import packed
from moe_dtensor.data.report import to_svg
from moe_dtensor.data.token_files import read_header


def write_texts(folder: Path, documents: int = 300) -> None:
    folder.mkdir()
    generator = random.Random(0)
    lines = []
    for i in range(documents):
        words = " ".join(generator.choice(["the", "cat", "sat", "mat"]) for _ in range(generator.randint(0, 60)))
        lines.append(json.dumps({"text": f"{i} {words}" if i % 10 else ""}))
    (folder / "a.jsonl").write_text("\n".join([*lines, lines[1], lines[2]]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def corpus(make_config, tmp_path: Path, tokenizer_file: Path):
    write_texts(tmp_path / "texts")
    config = make_config(corpus="files", path=str(tmp_path / "texts"), tokenizer=str(tokenizer_file))
    return build_corpus(config)


def test_shards_are_the_corpus_and_a_run_reads_them(corpus, make_config, tmp_path: Path, tokenizer_file: Path) -> None:
    written = shards.write_shards(corpus, tmp_path / "out", 1, 1000, lambda done: None)
    assert len(written["train"]) > 3
    assert all(1000 <= header.tokens < 1100 for header in written["train"][:-1])
    config = make_config(corpus="tokens", path=str(tmp_path / "out"), tokenizer=str(tokenizer_file), document_mask=True)
    read = build_corpus(config)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(read.token_array(split)[:], packed(corpus, split).tokens_N)
    assert read.contents["train"].documents == packed(corpus, "train").documents
    assert Loader(config, read).next_batch(0, 4).tokens_BS.shape == (4, 16)


def test_the_bytes_do_not_depend_on_workers_or_interruptions(corpus, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moe_dtensor.data.pack.CHUNK_DOCUMENTS", 7)
    shards.write_shards(corpus, tmp_path / "one", 1, 1000, lambda done: None)
    shards.write_shards(corpus, tmp_path / "two", 2, 1000, lambda done: None)
    generator, stops = random.Random(1), 0

    def stop(done: shards.Done) -> None:
        if generator.random() < 0.1:
            raise KeyboardInterrupt

    while True:
        try:
            shards.write_shards(corpus, tmp_path / "stopped", 1, 1000, stop)
        except KeyboardInterrupt:
            stops += 1
            continue
        break
    assert stops > 2
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    assert contents(tmp_path / "stopped") == whole


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


@pytest.mark.full
def test_killed_processes_leave_the_same_bytes(tmp_path: Path, tokenizer_file: Path) -> None:
    write_texts(tmp_path / "texts", 20_000)
    toml = tmp_path / "t.toml"
    toml.write_text(f'[data]\ncorpus = "files"\npath = "{tmp_path}/texts"\ntokenizer = "{tokenizer_file}"\n')
    command = [sys.executable, "-m", "moe_dtensor", "tokenize", "--config", str(toml), "--shard-tokens", "20000"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True)
    killed = 0
    for wait in (1.0, 1.5, 2.0, 2.5, 1.7, 2.2, 1000.0):
        process = subprocess.Popen([*command, "--output", str(tmp_path / "killed"), "--workers", "2"])
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.kill()
            process.wait()
            killed += 1
            left = workers
            for _ in range(100):
                left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
                time.sleep(0.05 if left else 0)
            assert not left, "workers outlived the process that started them"
            time.sleep(0.2)
    assert killed
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_folder_of_something_else_is_refused(corpus, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        shards.write_shards(corpus, tmp_path / "out", 1, 1000, lambda done: None)
    shards.write_shards(corpus, tmp_path / "out2", 1, 1000, lambda done: None)
    with pytest.raises(ConfigError, match="another shard_tokens"):
        shards.write_shards(corpus, tmp_path / "out2", 1, 2000, lambda done: None)


def test_the_verb_and_its_report(tmp_path: Path, tokenizer_file: Path, capsys) -> None:
    write_texts(tmp_path / "texts")
    toml = tmp_path / "t.toml"
    toml.write_text(
        f'[data]\ntokenizer = "{tokenizer_file}"\n'
        f'[[data.sources]]\nname = "web"\npath = "{tmp_path}/texts"\nweight = 1\n'
    )
    command = ["tokenize", "--config", str(toml), "--output", str(tmp_path / "out"), "--report"]
    assert main(command) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "web" / "report.json").read_text())
    train = [read_header(str(p)) for p in (tmp_path / "out" / "web" / "train").glob("*.tokens")]
    assert found["documents"] == sum(h.documents for h in train) == sum(found["histogram"].values())
    assert found["duplicates"] in (1, 2)  # of two, those that training holds
    assert found["non_text"] == 0
    assert any("cat" in window for window in found["windows"])
    assert f"{found['documents']:,} documents" in told
    assert list((tmp_path / "out" / "web").glob("report.*g"))
    assert main(command) == 0
    assert "was whole" in capsys.readouterr().out


def test_a_picture_without_matplotlib() -> None:
    import xml.etree.ElementTree

    tree = xml.etree.ElementTree.fromstring(to_svg({"1-1": 3, "2-3": 6}, "a < b"))
    widths = [float(bar.get("width", 0)) for bar in tree.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [190.0, 380.0]
