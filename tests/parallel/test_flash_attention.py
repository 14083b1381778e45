"""FlashAttention 4 inside whole steps, with plain PyTorch in the place of its package: alone, in compiled blocks,
recomputed. Without GPUs it is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.config import check_model
from moe_dtensor.config.load import load, override
from moe_dtensor.parallel import apply
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.verdict import Verdict
from tests.kernels.flash_package import FlashPackage

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
KEYS = {
    "model.attention_backend": "fa4",
    "model.num_kv_heads": 2,
    "training.param_dtype": "bfloat16",
    "moe.num_experts": 0,
    "moe.layers": (),
}
LATENT = {"model.num_kv_heads": 0, "model.qk_norm": "none", "model.kv_rank": 16}
LATENT |= {f"model.{name}": 8 for name in ("nope_dim", "rope_dim", "v_dim")}


def proven(compiled: bool = False, changes: dict[str, Any] | None = None) -> Verdict:
    layout = Layout(1, 1, 2)
    miniature = shrink(override(load(DEBUG), KEYS | (changes or {})), [layout], "bfloat16", compiled)
    assert miniature.model.attention_backend == "fa4"
    (verdict,) = prove([Case(layout, miniature, steps=2)])
    return verdict


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_model, "has_flash_attention_4", lambda: True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("compiled", "changes"),
    [
        (False, {}),
        (False, LATENT),
        pytest.param(True, {}, marks=pytest.mark.full),
        pytest.param(False, {"activation_checkpoint.mode": "selective"}, marks=pytest.mark.full),
        pytest.param(True, {"activation_checkpoint.mode": "selective"}, marks=pytest.mark.full),
    ],
)
def test_it_is_the_oracles(
    compiled: bool, changes: dict[str, Any], installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ranks are forked with these.
    FlashPackage().install(monkeypatch)
    monkeypatch.setattr(apply, "_check_hopper", lambda *_args, **_keys: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    verdict = proven(compiled, changes)
    assert verdict.ok, f"{verdict.worst} {verdict.failure}"


def test_cpus_are_refused(installed: None) -> None:
    assert "fa4 needs GPUs, Hopper or later; these ranks are on CPUs" in proven().failure
