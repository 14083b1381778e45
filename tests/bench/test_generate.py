"""``bench generate`` on a tiny folder: the same tokens, here and by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dtensor.__main__ import main
from tests.checkpoint.hugging_face.tiny_models import save_model


def test_the_same_tokens_as_transformers(tmp_path: Path) -> None:
    save_model("olmoe", tmp_path / "model")
    # In a process of its own: it makes the process groups of a rank.
    command = ["bench", "generate", "--checkpoint", str(tmp_path / "model"), "--batches", "1", "3", "--prompt", "5"]
    command += ["--tokens", "6", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, "-m", "moe_dtensor", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["implementation"], r["batch"]) for r in results] == [
        (name, batch) for name in ("moe_dtensor", "grouped_mm") for batch in (1, 3)
    ]
    assert all(r["alike"] == 1 and r["tokens_per_second"] > 0 for r in results)


def test_what_cannot_be_timed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "--checkpoint", str(tmp_path)]) == 2
    assert "is no Hugging Face folder" in capsys.readouterr().err
