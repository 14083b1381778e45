"""``bench transformers`` on a tiny model: every implementation is measured, and the numbers are in the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.verbs import bench

pytest.importorskip("transformers", minversion="5")


def test_each_implementation_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.json"
    small = ["--layers", "1", "--length", "16", "--json", str(out)]
    assert bench.main(["transformers", *small]) == 0
    record = json.loads(out.read_text())
    results = {result["implementation"]: result for result in record["results"]}
    assert list(results) == ["moe_dtensor", "grouped_mm", "eager"]
    assert record["options"]["widths"] == "tiny"
    for result in results.values():
        assert result["tokens_per_second"] > 0
        assert result["experts_tflops"] > 0
        assert result["loss"] == pytest.approx(results["eager"]["loss"], rel=1e-5)
        assert set(result["errors"]) == {"y", "x", "gate", "gate_up_proj", "down_proj"}


def test_a_wrong_answer_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_dtensor.integrations.transformers as integration

    right = integration.expert_mlp
    monkeypatch.setattr(integration, "expert_mlp", lambda *a, **k: 1.1 * right(*a, **k))
    out = tmp_path / "out.json"
    assert bench.main(["transformers", "--layers", "1", "--length", "16", "--json", str(out)]) == 1
    wrong, *others = json.loads(out.read_text())["results"]
    assert wrong["failure"].startswith("wrong")
    assert wrong["model"] is None
    assert all(other["model"] for other in others)


def test_a_wrong_size_is_told() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        bench.main(["transformers", "--layers", "0"])
