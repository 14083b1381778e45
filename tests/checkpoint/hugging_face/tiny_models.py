"""Random tiny models of every family, saved by transformers in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OWN_HEADS = {"head_dim": 16}
EXPERTS = {"moe_intermediate_size": 24, "intermediate_size": 56, "num_experts_per_tok": 3}
ROUTED = {**OWN_HEADS, **EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 6.0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Experts as wide as the model: a transposed projection keeps its shape.
    "mixtral": ("mixtral", {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral tied": ("mixtral", {"intermediate_size": 24, "num_local_experts": 6, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe normalised": ("olmoe", {"intermediate_size": 24, "num_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {**OWN_HEADS, **EXPERTS, "num_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe dense block, tied": (
        "qwen3_moe",
        {**OWN_HEADS, **EXPERTS, "num_experts": 6, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "dots1 groups": (
        "dots1",
        {**ROUTED, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "dots1": ("dots1", {**ROUTED, "first_k_dense_replace": 1, "norm_topk_prob": True, "n_shared_experts": 2}),
    "hy_v3": ("hy_v3", {**OWN_HEADS, **EXPERTS, "num_experts": 8}),
    "solar_open": ("solar_open", ROUTED),
    "sarvam_moe": ("sarvam_moe", ROUTED),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**OWN_HEADS, "moe_intermediate_size": 24, "intermediate_size": 56, "moe_num_experts": 6, "moe_k": 3},
    ),
    "granitemoe": ("granitemoe", {"intermediate_size": 24, "num_local_experts": 6, **GRANITE}),
    "dbrx": ("dbrx", {}),
    "llama": ("llama", {"intermediate_size": 56}),
    "mistral": ("mistral", {**OWN_HEADS, "intermediate_size": 56, "sliding_window": None}),
    "qwen3": ("qwen3", {**OWN_HEADS, "intermediate_size": 56, "tie_word_embeddings": True}),
}


def build_model(case: str) -> Any:
    """A model whose every tensor is random, norms and biases too, and which routes unevenly."""
    import transformers

    kind, keys = CASES[case]
    torch.manual_seed(3)
    if kind == "dbrx":
        config: Any = transformers.DbrxConfig(
            d_model=48,
            n_heads=4,
            n_layers=3,
            vocab_size=131,
            attn_config={"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 1e4},
            ffn_config={"hidden_size": 48, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
        )
    else:
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                value.normal_(0, 0.2)
            elif "norm" in name:
                value.normal_(1, 0.25)
            elif "inv_freq" not in name and value.is_floating_point():
                value.normal_(0, (1 if value.ndim < 2 else value.shape[-1]) ** -0.5)
    return model


def save_model(case: str, folder: Path, **options: Any) -> Path:
    """Its folder, as published: a tensor for each expert."""
    build_model(case).save_pretrained(folder, **options)
    return folder
