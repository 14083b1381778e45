"""Models of transformers give the same outputs and gradients with these experts as with their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

from moe_dtensor.integrations.transformers import register  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS = {
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 8, "norm_topk_prob": True, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "olmoe": ("Olmoe", {"num_experts": 8, "pad_token_id": None}),
}


def build(kind: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    family, more = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**SIZES, **more, experts_implementation=implementation)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # Large enough that routers tell tokens apart and experts matter.
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_((0.1 * noise).to(dtype))
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(SIZES["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(2))
    answer = model(input_ids=tokens, labels=tokens)
    answer.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return answer.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("backend", "dtype", "close"), [("auto", torch.float64, 1e-12), ("torch", torch.float32, 1e-5)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_equals_eager(kind: str, backend: str, dtype: torch.dtype, close: float) -> None:
    register(f"moe_dtensor_{backend}", backend)
    want, want_gradients = run(build(kind, "eager", dtype))
    got, got_gradients = run(build(kind, f"moe_dtensor_{backend}", dtype))
    assert (got - want).abs().max() <= close * want.abs().max()
    for name, gradient in want_gradients.items():
        assert gradient.abs().max() > 0, name
        assert (got_gradients[name] - gradient).abs().max() <= 10 * close * gradient.abs().max(), name


def test_selected_by_name_and_switched_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_dtensor.integrations.transformers as integration

    calls: list[str] = []
    original = integration.expert_mlp
    monkeypatch.setattr(integration, "expert_mlp", lambda *a, **k: calls.append(k["activation"]) or original(*a, **k))
    register()
    model = build("qwen3_moe", "moe_dtensor", torch.float32)
    run(model)
    assert calls == ["swiglu"] * 2
    model.set_experts_implementation("eager")
    run(model)
    assert len(calls) == 2


class Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        generator = torch.Generator().manual_seed(3)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8, generator=generator))
        self.up_proj = nn.Parameter(torch.randn(4, 6, 8, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6, generator=generator))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for t, k in (top_k_index < 4).nonzero().tolist():
            expert = top_k_index[t, k]
            h = self.act_fn(self.up_proj[expert] @ hidden_states[t])
            y[t] += top_k_weights[t, k] * (self.down_proj[expert] @ h)
        return y


def layer(act: str, implementation: str = "moe_dtensor", **how: bool) -> nn.Module:
    register()
    config = transformers.PreTrainedConfig(hidden_act=act, experts_implementation=implementation)
    return use_experts_implementation(type("Experts", (Experts,), {}), **how)(config)


def route() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 8, generator=generator)
    # Expert parallelism gives 4, one past the last, to choices that live elsewhere.
    ids = torch.tensor([[0, 1], [3, 4], [4, 4], [2, 0], [1, 3]])
    return x, ids, torch.rand(5, 2, generator=generator)


@pytest.mark.parametrize("act", ["silu", "gelu", "relu2"])
def test_without_a_gate_and_with_choices_elsewhere(act: str) -> None:
    got = layer(act, has_gate=False)(*route())
    torch.testing.assert_close(got, layer(act, "eager", has_gate=False)(*route()))


@pytest.mark.parametrize(
    ("how", "act", "reason"),
    [
        ({"has_bias": True}, "silu", "biases"),
        ({"is_transposed": True}, "silu", "transposed weights"),
        ({"is_concatenated": False}, "silu", "interleaved"),
        ({}, "gelu_new", "its activation is NewGELUActivation"),
    ],
)
def test_what_it_does_not_compute_is_told(how: dict[str, bool], act: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*Use experts_implementation = 'grouped_mm' or 'eager'"):
        layer(act, **how)(*route())


def test_a_gate_of_its_own_is_told() -> None:
    register()
    config = transformers.PreTrainedConfig(hidden_act="silu", experts_implementation="moe_dtensor")
    own = type("Own", (Experts,), {"_apply_gate": lambda self, h: h})
    with pytest.raises(ValueError, match="a gate of its own"):
        use_experts_implementation(own)(config)(*route())


def test_an_unknown_backend_is_told() -> None:
    with pytest.raises(ValueError, match="Use auto or one of reference"):
        register(backend="cuda")
