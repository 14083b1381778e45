"""The README's table is what was measured, and has every family."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from moe_dtensor.checkpoint.hugging_face.families import FAMILIES

ROOT = Path(__file__).parents[2]
SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Another name for a class that is measured."""


def test_the_readme_has_what_was_measured_of_every_family() -> None:
    spec = importlib.util.spec_from_file_location("families_table", ROOT / "scripts" / "families_table.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = json.loads((ROOT / script.RESULT).read_text())
    table = (ROOT / script.PAGE).read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    assert table == script.table(result)
    measured = {found["model_type"] for found in result["models"].values()}
    assert {SAME_AS.get(name, name) for name in FAMILIES} == measured
