"""What the last line of a test run says of GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import gpu_seen


@pytest.mark.parametrize(
    ("ok", "says"),
    [
        (True, "GPU: 2 x Card has seen these kernels/, parallel/ and train/."),
        (
            False,
            "warning: 2 x Card has seen these kernels/, parallel/ and train/, but "
            "these parts failed or did not end: b.",
        ),
    ],
)
def test_parts_that_failed_are_named(ok: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"name": "a", "ok": True}, {"name": "b", "ok": ok}]
    record = {"ok": ok, "gpus": 2, "device": "Card", "trees": gpu_seen.tree_hashes(), "parts": parts}
    trees = gpu_seen.tree_hashes()
    (tmp_path / "x_proof.json").write_text(json.dumps(record))
    monkeypatch.setattr(gpu_seen, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_seen, "RECORDS", "*_proof.json")
    monkeypatch.setattr(gpu_seen, "tree_hashes", lambda: trees)
    assert gpu_seen.unseen() == says
