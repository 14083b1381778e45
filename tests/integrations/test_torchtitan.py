"""A torchtitan model gives the same outputs and gradients with these experts as with its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchtitan")

with warnings.catch_warnings():
    # torchtitan loads inductor, which trips over torch's own deprecations.
    warnings.simplefilter("ignore")
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.moe import MoE, MoEArgs
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs
    from torchtitan.protocols.model_converter import build_model_converters

    from moe_dtensor.integrations.torchtitan import NAME, KernelMoE


@pytest.fixture(autouse=True)
def histogram_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan counts choices with an operator that torch has on GPUs only."""
    histc = torch.histc
    monkeypatch.setattr(torch, "histc", lambda x, *a, **k: histc(x.double(), *a, **k).to(x.dtype))


def converted(model: nn.Module, **degrees: int) -> nn.Module:
    job = JobConfig()
    job.model.converters = [NAME]
    all_degrees = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "etp": 1} | degrees
    world = all_degrees["dp_shard"] * all_degrees["tp"]
    twin = copy.deepcopy(model)
    build_model_converters(job, ParallelDims(**all_degrees, world_size=world)).convert(twin)
    return twin


def arguments(**changed: Any) -> MoEArgs:
    plain = {"num_experts": 8, "num_shared_experts": 0, "top_k": 2, "score_func": "softmax"}
    return MoEArgs(**plain | {"score_before_experts": False, "use_grouped_mm": False} | changed)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), gradients | ({"x": x.grad} if x.is_floating_point() else {})


def compare(model: nn.Module, x: torch.Tensor) -> nn.Module:
    twin = converted(model)
    other = x.detach().clone().requires_grad_(x.is_floating_point())
    (want, want_gradients), (got, got_gradients) = run(model, x), run(twin, other)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert list(got_gradients) == list(want_gradients)
    for name, gradient in want_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    return twin


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"route_norm": True, "route_scale": 2.5, "num_shared_experts": 2},
        {"score_func": "sigmoid", "top_k": 1, "score_before_experts": True},
        {"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2},
    ],
    ids=["plain", "shared", "scored before", "groups"],
)
def test_the_layer_equals_the_original(changed: dict[str, Any]) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(MoE(arguments(**changed), dim=16, hidden_dim=24))
    with torch.no_grad():
        holder[0].init_weights(0.5, torch.device("cpu"))
        for parameter in holder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    twin = compare(holder, torch.randn(2, 11, 16, requires_grad=True))
    assert isinstance(twin[0], KernelMoE)
    # Balancing goes on: the counts are torchtitan's.
    assert torch.equal(twin[0].tokens_per_expert, holder[0].tokens_per_expert)


def test_a_whole_model_equals_the_original() -> None:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 64}
    moe = {"moe_enabled": True, "moe_inter_dim": 24, "moe_args": arguments(route_norm=True)}
    model = Qwen3Model(Qwen3ModelArgs(**sizes, **moe, hidden_dim=64, max_seq_len=16, qk_norm=True))
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
    twin = compare(model, torch.randint(64, (2, 16)))
    assert list(twin.state_dict()) == list(model.state_dict())


def test_what_it_does_not_compute_is_told() -> None:
    holder = nn.Sequential(MoE(arguments(), dim=8, hidden_dim=8))
    with pytest.raises(ValueError, match="expert parallelism is 2"):
        converted(holder, dp_shard=2, ep=2)
    with pytest.raises(ValueError, match="tensor parallelism 2"):
        converted(holder, tp=2)
    with pytest.raises(ValueError, match="Set score_before_experts = False"):
        converted(nn.Sequential(MoE(arguments(score_before_experts=True), dim=8, hidden_dim=8)))
    with pytest.raises(ValueError, match="has no"):
        converted(nn.Linear(2, 2))
