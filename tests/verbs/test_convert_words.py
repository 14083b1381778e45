"""What ``convert`` takes --input and --output to be where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dtensor.verbs.convert import _parse


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["--input", "published"], ("hf", "native")),
        (["--input", "run"], ("native", "hf")),
        (["--input", "run", "--prune-experts", "2"], ("native", "native")),
        (["--input", "published", "--upcycle", "4"], ("hf", "native")),
        (["--input", "published", "--config-only"], ("hf", "native")),
        (["--input", "run", "--from", "hf", "--to", "native"], ("hf", "native")),
    ],
)
def test_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kinds: tuple[str, str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in (("published", "config.json"), ("run", "run.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    options = _parse([*words, "--output", "out"])
    assert (options.source, options.to) == kinds
