"""Predictions are those of ``plan``, and a variant that cannot run says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import predict

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def test_every_variant_is_predicted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants, out = tmp_path / "variants.toml", tmp_path / "out.json"
    variants.write_text("[wide]\nmesh.tp = 2\n[odd]\nmesh.tp = 3\n", encoding="utf-8")
    words = ["--config", str(DEBUG), "--variants", str(variants), "--gpus", "4", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["predict.py", *words])
    predict.main()
    found = json.loads(out.read_text(encoding="utf-8"))["predictions"]["debug"]
    assert found["wide"]["mesh"] == "2x1x2"
    speeds = found["wide"]["tokens_per_second"]
    assert speeds["balanced"] >= speeds["learned"] >= speeds["skewed"] > 0
    assert found["wide"]["peak_memory_gib_skewed"] >= found["wide"]["peak_memory_gib"] > 0
    assert "tp=3" in found["odd"]["refused"]
