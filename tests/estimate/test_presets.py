"""The presets of published models hold as many parameters as their authors say, and compute what the oracle does."""

from __future__ import annotations

import pytest

from moe_dtensor.config.load import load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.estimate.shards import parameters
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.run import prove

PUBLISHED = {
    "gpt_oss_20b": 20.9,
    "deepseek_v3_671b": 671.0,
    "moonlight_16b_a3b": 15.96,
    "glm_4_5_air": 106.9,
    "minimax_m2": 228.7,
    "qwen2_57b_a14b": 57.4,
    "flex_olmo_7x7b": 33.3,
    "hunyuan_a13b": 80.4,
    "ernie_4_5_21b_a3b": 21.8,
    "dots_llm1": 142.8,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235.1,
    "mixtral_8x7b": 46.7,
    "olmoe_1b_7b": 6.92,
}
"""Billions of parameters, without modules for further tokens."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    config = override(load(f"train_configs/{name}.toml"), {"model.mtp_depth": 0})
    ranks = config.mesh.pp * config.mesh.tp
    total, _ = parameters(resolve(config, ranks))
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_miniatures_are_proven(name: str) -> None:
    config = override(load(f"train_configs/{name}.toml"), {"mesh.pp": 1, "mesh.tp": 1})
    layouts = [Layout(2, 1, 1), Layout(1, 1, 2)]
    miniature = shrink(config, layouts)
    for verdict in prove([Case(layout, miniature) for layout in layouts]):
        assert verdict.ok, f"{verdict.mesh}: {verdict.worst} {verdict.failure}"
