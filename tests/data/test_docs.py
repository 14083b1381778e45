"""The how-to's code runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from moe_dtensor.data import Loader, build_corpus

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
