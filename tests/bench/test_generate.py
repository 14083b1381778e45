"""``bench generate`` on a tiny folder: the same tokens, here and by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_dtensor.__main__ import main


def test_the_same_tokens_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "model")
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
