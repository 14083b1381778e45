"""``bench attention`` compares before it times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from moe_dtensor.__main__ import main
from moe_dtensor.bench import attention


def test_it_times_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "attention.json"
    assert main(["bench", "attention", "--shapes", "tiny", "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    chosen = [r for r in results if r["way"] == "attend"]
    assert len(chosen) == len(attention.SHAPES["tiny"])
    for result in chosen:
        assert result["milliseconds"] > 0
        assert max(result["error"].values()) < 1e-5
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_wrong_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    right = attention.attend

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * 1.1

    with mock.patch.object(attention, "attend", wrong):
        assert main(["bench", "attention", "--shapes", "tiny"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--shapes", "huge"]) == 2
    assert "documents" in capsys.readouterr().err
