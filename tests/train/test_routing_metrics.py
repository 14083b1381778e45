"""What a run tells of its routers."""

from __future__ import annotations

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.router import STATISTICS
from moe_dtensor.layers.router import RoutingRecord as Routing
from moe_dtensor.train.routing import routing_metrics, routing_notice
from moe_dtensor.train.step import StepResult


def result_of(experts: int = 4) -> StepResult:
    load = torch.tensor([[8.0, 0, 4, 4], [4, 4, 4, 4]], dtype=torch.float64)[:, :experts]
    means = {name: torch.tensor([0.5, 0.25], dtype=torch.float64) for name in STATISTICS}
    one = torch.tensor(1.0, dtype=torch.float64)
    return StepResult(
        one, one, one > 0, Routing(load, means), torch.tensor([0.0, 0.125], dtype=torch.float64), one[None][:0], 0 * one
    )


def test_diagnostics_of_what_is_off_are_left_out() -> None:
    shown = routing_metrics(override(Config(), {"moe.router": "topk"}), result_of())
    assert {name: value.tolist() for name, value in shown.items() if name.startswith("expert")} == {
        "expert_load_max_over_mean": [2.0, 1.0],
        "expert_load_cv": [pytest.approx(8**0.5 / 4), 0.0],
        "experts_without_tokens": [1, 0],
        "expert_load_churn": [0.0, 0.125],
    }
    assert set(shown) & set(STATISTICS) == {"router_entropy", "router_margin", "router_gate_norm", "router_z"}
    everything = {"moe.router": "sinkhorn", "moe.balance_loss": 0.01, "moe.capacity_factor": 1.0}
    assert set(routing_metrics(override(Config(), everything), result_of())) >= set(STATISTICS)


def test_forced_routers_and_expert_choice_are_announced() -> None:
    forced = override(Config(), {"moe.router": "zipf"})
    assert routing_metrics(forced, result_of())["forced_router"] == "zipf"
    assert "moe.router = zipf is forced" in routing_notice(forced)
    assert "Validation takes plain top-k" in routing_notice(override(Config(), {"moe.router": "expert_choice"}))
    for quiet in ({"moe.router": "topk"}, {"moe.router": "expert_choice", "moe.num_experts": 0}):
        assert routing_notice(override(Config(), quiet)) == ""
