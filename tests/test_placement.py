"""The placement table: every parameter has exactly one row, every row a parameter."""

from __future__ import annotations

import re

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.shards import parameters
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.placement import build_table, find_row

VARIANTS = {
    "plain": {},
    "every second block, shared expert": {"moe.every": 2, "moe.num_shared_experts": 1, "model.qk_norm": "head"},
    "plain activation, whole-width norm": {"model.activation": "gelu", "model.qk_norm": "full", "moe.every": 3},
    "fewer key/value heads than tp": {"model.num_kv_heads": 2, "mesh.tp": 8, "model.qk_norm": "full"},
    "norms on both sides, a gated shared expert": {
        "model.norm_at": "both",
        "moe.shared_hidden_dim": 96,
        "moe.shared_gate": True,
        "moe.router_bias": True,
        "moe.expert_bias": True,
        "model.mtp_depth": 1,
    },
    "biases, sinks, a gate": {"model.attention_bias": "all", "model.sinks": True, "model.attention_gate": True},
    "every bias": {
        "model.norm": "layernorm",
        "model.norm_bias": True,
        "model.ffn_bias": True,
        "model.head_bias": True,
        "model.mtp_depth": 1,
        "moe.every": 2,
    },
    "latent attention": {"model.kv_rank": 32, "model.nope_dim": 32, "model.rope_dim": 16, "model.v_dim": 24},
    "latent queries too": {
        "model.q_rank": 48,
        "model.kv_rank": 32,
        "model.nope_dim": 32,
        "model.rope_dim": 16,
        "model.v_dim": 24,
    },
    "tied": {"model.tie_embeddings": True, "model.norm": "layernorm"},
}


def build(overrides: dict[str, object]) -> tuple[Config, Transformer]:
    config = resolve(override(Config(), {"model.vocab_size": 257, **overrides}), 8)
    with torch.device("meta"):
        return config, Transformer(config, range(config.model.num_layers + config.model.mtp_depth))


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_one_row_for_every_parameter(overrides: dict[str, object]) -> None:
    config, model = build(overrides)
    table = build_table(config)
    for name, param in model.named_parameters():
        row = find_row(table, name)
        assert row.dp != row.tp or param.ndim == 1, f"{name}: dp and tp split the same dimension"
        if row.tp is not None:
            assert param.shape[row.tp] % config.mesh.tp == 0
        if param.ndim > 1 and not name.endswith("up_bias"):
            widths = {"wq_b": config.model.q_rank, "wkv_b": config.model.kv_rank}
            width = widths.get(name.split(".")[-2], config.model.dim)
            if ".experts." in name and config.mesh.tp == 1:
                width = config.moe.num_experts
            assert param.shape[row.dp] == width, f"{name}: dp must split the model width, or the latent's"


@pytest.mark.parametrize(("keys", "first"), [({}, True), ({"mesh.tp": 2}, False), ({"moe.num_experts": 12}, False)])
def test_fsdp_splits_experts_where_tp_does_not_and_dp_divides_them(keys: dict[str, object], first: bool) -> None:
    config, _ = build(keys)
    assert find_row(build_table(config), "layers.0.moe.experts.w_up").dp == (0 if first else 3)


def test_one_parameter_for_every_row() -> None:
    seen: set[str] = set()
    rows: set[str] = set()
    for overrides in VARIANTS.values():
        config, model = build(overrides)
        table = build_table(config)
        rows |= {row.pattern for row in table}
        seen |= {find_row(table, name).pattern for name, _ in model.named_parameters()}
    assert rows == seen


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="matches 0 rows"):
        find_row(build_table(build({})[0]), "layers.0.attention.wz.weight")


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_counts_are_those_of_the_model(overrides: dict[str, object]) -> None:
    config, model = build(overrides)
    total, active = parameters(config)
    assert total == sum(param.numel() for param in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if re.search(r"\.experts\.", name))
    assert active == total - experts + experts * config.moe.top_k // config.moe.num_experts
