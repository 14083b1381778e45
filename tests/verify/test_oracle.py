"""The oracle is itself judged: by finite differences, and piece by piece by torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.verify import oracle, oracle_routing
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.oracle import IGNORED, Microbatch, one_step

TINY = {
    "model.num_layers": 2,
    "model.dim": 12,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.hidden_dim": 10,
    "model.vocab_size": 20,
    "moe.num_experts": 4,
    "moe.hidden_dim": 6,
    "moe.num_shared_experts": 1,
    "moe.layers": (1,),
    "training.seq_len": 5,
    "training.global_batch_size": 4,
    "training.microbatch_size": 2,
    "training.param_dtype": "float64",
}
VARIANTS = {
    "sinkhorn k=2 swiglu rmsnorm": {},
    "sinkhorn k=1 gelu layernorm": {"moe.top_k": 1, "model.activation": "gelu", "model.norm": "layernorm"},
    "topk relu2 qk full tied": {
        "moe.router": "topk",
        "model.activation": "relu2",
        "model.qk_norm": "full",
        "model.tie_embeddings": True,
    },
    "groups qk head geglu documents": {
        "moe.group_sequences": 1,
        "model.qk_norm": "head",
        "model.activation": "geglu",
        "data.document_mask": True,
    },
    "biases clip partial rotation after-rope norm window sinks": {
        "model.attention_bias": "all",
        "model.clip_qkv": 0.7,
        "model.head_dim": 6,
        "model.rotary_dim": 4,
        "model.qk_norm": "head_after_rope",
        "model.window": 2,
        "model.sinks": True,
    },
    "biases of norms feed-forward head parallel block": {
        "model.norm": "layernorm",
        "model.norm_bias": True,
        "model.ffn_bias": True,
        "model.head_bias": True,
        "model.parallel_block": True,
        "model.logit_scale": 1.5,
        "moe.layers": (1,),
    },
    "latent attention gate": {
        "model.num_kv_heads": 0,
        "model.q_rank": 7,
        "model.kv_rank": 5,
        "model.nope_dim": 3,
        "model.rope_dim": 2,
        "model.v_dim": 4,
        "model.attention_gate": True,
    },
    "expert choice": {"moe.router": "expert_choice", "moe.jitter": 0.1},
    "uniform capacity after top-k": {
        "moe.router": "uniform",
        "moe.score_before_top_k": False,
        "moe.capacity_factor": 0.7,
        "moe.gate_scale": 2.0,
    },
    "sigmoid normalized expert groups": {
        "moe.router": "topk",
        "moe.score": "sigmoid",
        "moe.normalize_gates": True,
        "moe.expert_groups": 2,
        "moe.expert_groups_kept": 1,
    },
}


def tiny(**changes: object) -> Config:
    return resolve(override(Config(), TINY | {key.replace("__", "."): value for key, value in changes.items()}), 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_gradient_is_the_slope_of_the_loss(name: str) -> None:
    config = resolve(override(Config(), TINY | VARIANTS[name]), 1)
    weights, batch = initial_values(config), global_batch(config)
    answer = one_step(config, weights, batch)
    generator = torch.Generator().manual_seed(1)
    for parameter, value in weights.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / direction.norm()
        losses = [one_step(config, weights | {parameter: value + s * step * direction}, batch).loss for s in (1, -1)]
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = (answer.gradients[parameter] * direction).sum()
        assert torch.isclose(expected, slope, rtol=1e-5, atol=1e-8), parameter


def model_of(config: Config, weights: dict[str, torch.Tensor]) -> oracle.Transformer:
    return oracle.Transformer(config, weights, {})


def test_attention_is_torchs() -> None:
    config = tiny()
    weights, (microbatch, _) = initial_values(config), global_batch(config)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (x @ weights[f"layers.0.attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
    angle = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)

    def turn(t: torch.Tensor) -> torch.Tensor:
        a, b = t[..., :2], t[..., 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
    expected = y.transpose(1, 2).flatten(2) @ weights["layers.0.attention.wo.weight"].T
    torch.testing.assert_close(model_of(config, weights)._attention(0, x, microbatch), expected)


def test_cross_entropy_is_torchs() -> None:
    logits, labels = torch.randn(9, 20, dtype=torch.float64) * 5, torch.randint(0, 20, (9,))
    labels[2:4] = IGNORED
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(oracle.cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_is_torchs(norm: str) -> None:
    config, x, weight = tiny(model__norm=norm), torch.randn(3, 12).double() * 2 + 1, torch.randn(12).double()
    eps = config.model.norm_eps
    expected = F.layer_norm(x, (12,), weight, None, eps) if norm == "layernorm" else F.rms_norm(x, (12,), weight, eps)
    torch.testing.assert_close(model_of(config, {"n.weight": weight})._norm("n", x), expected)


def test_activations_are_torchs() -> None:
    x, gate = torch.randn(2, 7, dtype=torch.float64)
    expected = {
        "swiglu": F.silu(gate) * x,
        "geglu": F.gelu(gate) * x,
        "gelu": F.gelu(x),
        "silu": F.silu(x),
        "relu2": F.relu(x).square(),
    }
    for name, value in expected.items():
        found = model_of(tiny(model__activation=name), {})._activate(x, gate if name.endswith("glu") else None)
        torch.testing.assert_close(found, value, msg=name)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_clipped_steps_are_torchs_adamw(order: float) -> None:
    config = tiny(training__norm_type=order, training__max_grad_norm=0.1, lr_scheduler__warmup_steps=2)
    values = initial_values(config)
    parameters = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
    kept = [p for n, p in parameters.items() if "norm" in n or "router" in n or "tok_embeddings" in n]
    decayed = [p for n, p in parameters.items() if not ("norm" in n or "router" in n or "tok_embeddings" in n)]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    theirs, ours = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8), oracle.AdamW(config, values)
    for lr in (1.5e-4, 3e-4):
        gradients = {name: torch.randn_like(v) for name, v in values.items()}
        for name, p in parameters.items():
            p.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1, norm_type=order)
        assert oracle.gradient_norm(gradients, order) == pytest.approx(float(norm), rel=1e-12)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        ours.step(gradients, float(norm), lr)
        for name, p in parameters.items():
            torch.testing.assert_close(ours.parameters[name], p.data, msg=name)


def test_the_oracle_knows_no_decay_of_the_learning_rate() -> None:
    config = tiny(lr_scheduler__warmup_steps=2)
    assert [oracle.learning_rate(config, step) for step in (1, 2)] == [1.5e-4, 3e-4]
    with pytest.raises(ValueError, match="Step 3 is beyond"):
        oracle.learning_rate(config, 3)
    assert oracle.learning_rate(tiny(lr_scheduler__warmup_steps=0), 1) == 3e-4
    assert oracle.learning_rate(tiny(lr_scheduler__decay="constant", lr_scheduler__warmup_steps=1), 9) == 3e-4


def test_sinkhorn_balances_and_a_shift_of_a_column_changes_nothing() -> None:
    logits = torch.randn(40, 5, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 0])
    p = oracle_routing.sinkhorn(logits, 50)
    torch.testing.assert_close(p.sum(0), torch.full((5,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=torch.float64))
    shifted = oracle_routing.sinkhorn(logits + torch.tensor([0, 0, 2.0, 0, -1]), 200)
    torch.testing.assert_close(shifted, oracle_routing.sinkhorn(logits, 200))


def test_documents_in_one_sequence_are_as_sequences_of_their_own() -> None:
    """With a choice per token only attention and positions can mix documents."""
    config = tiny(moe__router="topk")
    weights = initial_values(config)
    tokens, labels = torch.randint(0, 20, (2, 1, 5))
    documents = torch.tensor([[7, 7, 8, 8, 8]])
    joined = one_step(config, weights, [Microbatch(tokens, labels, documents)])
    parts = [Microbatch(tokens[:, s], labels[:, s]) for s in (slice(0, 2), slice(2, 5))]
    apart = one_step(config, weights, parts)
    assert joined.loss == pytest.approx(apart.loss, rel=1e-12)
    for name, gradient in apart.gradients.items():
        torch.testing.assert_close(joined.gradients[name], gradient, msg=name)


def test_routing_is_told_per_layer_and_microbatch() -> None:
    config = tiny()
    answer = one_step(config, initial_values(config), global_batch(config))
    assert list(answer.routing) == [1]
    assert [tuple(t.shape) for t in answer.routing[1]] == [(10, 2), (10, 2)]
    assert answer.counts[1].sum() == 2 * 10 * 2


def test_an_expert_can_be_made_to_get_no_token() -> None:
    config = tiny(moe__router="topk", moe__top_k=1)
    answer = one_step(config, initial_values(config, empty_expert=True), global_batch(config))
    assert answer.counts[1][0] == 0
    assert (answer.gradients["layers.1.moe.experts.w_down"][0] == 0).all()
    assert answer.gradients["layers.1.moe.router.weight"][0].norm() > 0
