"""FlexAttention inside whole steps: alone, in compiled blocks, recomputed. On a CPU its operator is traced as on a GPU
and then computed by torch's own plain form of it, for it has no backward kernel there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from moe_dtensor.config.load import load, override
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.run import prove

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
KEYS = {
    "data.document_mask": True,
    "model.window": 16,
    "model.window_layers": ("window", "full"),
    "model.sinks": True,
    "model.attention_backend": "flex",
    "moe.num_experts": 0,
    "moe.layers": (),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("compiled", "changes"),
    [
        pytest.param(False, {}, marks=pytest.mark.full),
        pytest.param(False, {"activation_checkpoint.mode": "selective"}, marks=pytest.mark.full),
        pytest.param(True, {}, marks=pytest.mark.full),
        pytest.param(True, {"activation_checkpoint.mode": "full"}, marks=pytest.mark.full),
        pytest.param(
            True, {"activation_checkpoint.mode": "selective", "model.num_kv_heads": 2}, marks=pytest.mark.full
        ),
    ],
)
def test_it_is_the_oracles(compiled: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks are forked with these.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_tensors: None)
    layout = Layout(1, 1, 2)
    miniature = shrink(override(load(DEBUG), KEYS | changes), [layout], "float32", compiled)
    assert miniature.model.attention_backend == "flex"
    (verdict,) = prove([Case(layout, miniature, steps=3)])
    assert verdict.ok, f"{verdict.worst} {verdict.failure}"
