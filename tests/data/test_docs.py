"""The how-to's code runs as it stands."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.check import check
from moe_dtensor.config.load import load
from moe_dtensor.data import Loader, build_corpus
from tests.data.chat_templates import save_tokenizer
from tests.data.test_token_files import write_pair

BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL
)


def find_block(word: str) -> str:
    [block] = [b for b in BLOCKS if word in b]
    return block


def test_the_corpus_of_ones_own(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "recipes.csv"
    rows = [f"cake {i},take {i} eggs and {i * 7} grams of flour" for i in range(200)]
    table.write_text("\n".join(["title,steps", *rows]))
    (tmp_path / "my_recipe_data.py").write_text(find_block("class Recipes"))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_config(corpus="my_recipe_data:Recipes", path=str(tmp_path / "recipes.csv"))
    corpus = build_corpus(config)
    assert Loader(config, corpus).next_batch(0, 4).tokens_BS.shape == (4, 16)
    assert [*corpus.documents("validation")] == [row.replace(",", "\n\n") for row in rows[::20]]
    before = corpus.fingerprint()
    table.write_text(table.read_text() + "\nmore,and more")
    assert corpus.fingerprint() != before
    sys.modules.pop("my_recipe_data")


def write_what_one_has(folder: Path) -> None:
    """Everything that the decision table names, in small."""
    texts = [{"text": f"document {i} " * 9, "body": f"body {i} " * 9} for i in range(200)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (folder / "folder").mkdir()
    (folder / "folder" / "a.jsonl").write_text(lines)
    (folder / "held_out.jsonl").write_text(lines[:9000])
    (folder / "book.txt").write_text("a line of the book\n" * 2000)
    ids = np.random.default_rng(0).integers(257, size=20000)
    ids[::50] = 256
    np.save(folder / "ids.npy", ids)
    ids.astype("<u4").tofile(folder / "ids.uint32.bin")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (folder / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": talk, "tools": [i]}) + "\n" for i in range(400))
    )
    save_tokenizer(folder / "my-model", "plain")
    short = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "my-model" / "chat_template.jinja").write_text(short)
    write_pair(folder / "name_text_document", np.split(ids, 20), "int32")


def table_rows() -> list[tuple[str, str]]:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = text[text.index("| I have … | TOML |") :].split("\n\n")[0]
    return [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[2:]]  # type: ignore[misc]


def test_each_row_of_the_decision_table_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the hub and of a corpus of one's own are tested elsewhere; those that name keys are run with values."""
    write_what_one_has(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = table_rows()
    assert len(rows) == 16
    run = 0
    for _, remedy in rows:
        codes = re.findall(r"`([^`]+)`", remedy)
        if any("allenai" in code or "my_data" in code for code in codes):
            continue
        if "[[data.sources]]" in codes:
            body = '[[data.sources]]\nname = "a"\npath = "folder"\nweight = 1\n'
        elif "[[stages]]" in codes:
            body = "[[stages]]\nfrom_step = 2\nseq_len = 8\n"
        else:
            if codes[0].startswith("python"):
                (tmp_path / "text.toml").write_text('[data]\ncorpus = "files"\npath = "folder"\n')
                assert main(codes.pop(0).split()[3:]) == 0
            beside = "beside the above" in remedy or "packing" in codes[0]
            base = ['corpus = "files"', 'path = "folder"'] if beside else []
            body = "[data]\n" + "\n".join([*base, *(code for code in codes if "=" in code)]) + "\n"
        (tmp_path / "run.toml").write_text(body + "[training]\nseq_len = 16\nglobal_batch_size = 4\n")
        config = load(tmp_path / "run.toml")
        check(config, 1) if "[[" not in body else None
        assert Loader(config, build_corpus(config)).next_batch(0, 4).tokens_BS.shape == (4, 16), body
        run += 1
    assert run == 14


def test_tests_that_hold_what_once_went_wrong_exist() -> None:
    table = Path("docs/checkpoints.md").read_text().partition("## What once went wrong")[2].partition("\n## ")[0]
    found = 0
    for row in table.splitlines():
        file = ""
        for word in re.findall(r"`([^`]+)`", row):
            if word.endswith(".py"):
                file = Path("tests", word).read_text()
            elif file:
                assert f"def {word}(" in file, word
                found += 1
    assert found > 30
