"""Write a step file of transformers' Qwen3-MoE: step_file_transformers.py OUT.json [--double-softmax]."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from moe_dtensor.verify.step_file import Name, write_step_file

E, K, F, D, HEADS, HEAD, VOCAB = 8, 2, 16, 32, 4, 8, 64
COEFFICIENT = 0.05
LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8


def export(path: Path, double_softmax: bool = False) -> None:
    """One AdamW step of a model of two blocks, of which the second has experts, with the load-balancing loss.

    Args:
        path: of the JSON.
        double_softmax: let the router hand probabilities where logits are expected, as it did until transformers'
            pull request 45131 (March 2026): the load-balancing loss then takes the softmax of a softmax.
    """
    right = qwen.Qwen3MoeTopKRouter.forward

    def wrong(self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        logits, *rest = right(self, hidden)
        return logits.softmax(-1), *rest

    with mock.patch.object(qwen.Qwen3MoeTopKRouter, "forward", wrong if double_softmax else right):
        _export(path)


def _export(path: Path) -> None:
    model = build()
    tokens, labels = torch.randint(0, VOCAB, (2, 2, 12)).unbind()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    out = model(input_ids=tokens, labels=labels, shift_labels=labels)
    out.loss.backward()
    optimizer.step()
    write_step_file(
        path,
        trainer=f"transformers {transformers.__version__} Qwen3MoeForCausalLM",
        dtype="float32",
        loss=float((out.loss - COEFFICIENT * out.aux_loss).detach()),
        config=tables(model.config),
        batch={"tokens": tokens, "labels": labels},
        tensors={
            "weights": before,
            "gradients": {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()},
            "after": dict(model.named_parameters()),
        },
        names=names(),
    )


def build() -> qwen.Qwen3MoeForCausalLM:
    """The model, with weights that hide nothing."""
    torch.manual_seed(0)
    config = qwen.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        moe_intermediate_size=F,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
        tie_word_embeddings=False,
    )
    model = qwen.Qwen3MoeForCausalLM(config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def tables(config: qwen.Qwen3MoeConfig) -> dict[str, dict[str, Any]]:
    """The same computation in the words of a TOML."""
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    return {
        "model": {
            "num_layers": 2,
            "dim": D,
            "num_heads": HEADS,
            "num_kv_heads": 2,
            "head_dim": HEAD,
            "vocab_size": VOCAB,
            "hidden_dim": 24,
            "activation": "swiglu",
            "norm_eps": config.rms_norm_eps,
            "qk_norm": "head",
            "rope_theta": float(theta),
        },
        "moe": {
            "num_experts": E,
            "top_k": K,
            "hidden_dim": F,
            "layers": [1],
            "router": "topk",
            # Theirs sums the shares of all K choices, which is K times as much.
            "normalize_gates": True,
            "balance_loss": COEFFICIENT * K,
            "balance_over": "group",
        },
        "training": {"microbatch_size": 2, "max_grad_norm": 0.0},
        "optimizer": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.0},
        "lr_scheduler": {"warmup_steps": 0},
    }


def names() -> dict[str, Name]:
    """Where each of our parameters is."""
    found: dict[str, Name] = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for i in range(2):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        found[ours + "attention_norm.weight"] = theirs + "input_layernorm.weight"
        found[ours + "ffn_norm.weight"] = theirs + "post_attention_layernorm.weight"
        for w in "qkvo":
            found[f"{ours}attention.w{w}.weight"] = f"{theirs}self_attn.{w}_proj.weight"
        for w in "qk":
            found[f"{ours}attention.{w}_norm.weight"] = f"{theirs}self_attn.{w}_norm.weight"
    for w in ("gate", "up", "down"):
        found[f"layers.0.feed_forward.{w}.weight"] = f"model.layers.0.mlp.{w}_proj.weight"
    moe = "model.layers.1.mlp."
    found["layers.1.moe.router.weight"] = moe + "gate.weight"
    found["layers.1.moe.experts.w_up"] = {"from": moe + "experts.gate_up_proj", "shape": [E, 2, F, D]}
    found["layers.1.moe.experts.w_down"] = moe + "experts.down_proj"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--double-softmax", action="store_true")
    export(**{"path" if k == "out" else k: v for k, v in vars(parser.parse_args()).items()})
