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

DENSE = {**OWN_HEADS, "intermediate_size": 56}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
STRETCHED = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# A quarter of a head is turned, which has to be even.
NEOX = {"intermediate_size": 56, "num_attention_heads": 3, "num_key_value_heads": None}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]

ATTENTION_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama scaled": ("llama", {"intermediate_size": 56, "rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"intermediate_size": 56, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral window": ("mistral", {**DENSE, "sliding_window": 9}),
    "mixtral window": ("mixtral", {"intermediate_size": 24, "num_local_experts": 6, "sliding_window": 9}),
    "qwen2": ("qwen2", {"intermediate_size": 56, "rope_parameters": YARN}),
    "qwen2 windows": (
        "qwen2",
        {"intermediate_size": 56, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "olmo3": (
        "olmo3",
        {
            "intermediate_size": 56,
            "sliding_window": 9,
            "layer_types": KINDS,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "glm4_moe": ("glm4_moe", {**ROUTED, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe plain": ("glm4_moe", {**ROUTED, "n_group": 4, "topk_group": 2}),
    "minimax_m2": (
        "minimax_m2",
        {**OWN_HEADS, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "exaone_moe": ("exaone_moe", {**OWN_HEADS, **EXPERTS, "num_experts": 8, "layer_types": KINDS, "sliding_window": 7}),
    "mellum": (
        "mellum",
        {
            **OWN_HEADS,
            **EXPERTS,
            "num_experts": 6,
            "layer_types": KINDS,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "flint": (
        "flint",
        {
            **OWN_HEADS,
            **EXPERTS,
            "num_experts": 6,
            "layer_types": KINDS,
            "sliding_window": 7,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
        },
    ),
    "afmoe": (
        "afmoe",
        {
            **OWN_HEADS,
            **EXPERTS,
            "num_experts": 6,
            "layer_types": KINDS,
            "sliding_window": 7,
            "mup_enabled": True,
            "route_scale": 2.5,
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {
            **OWN_HEADS,
            "intermediate_size": 24,
            "num_experts": 6,
            "moe_topk": 2,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **OWN_HEADS,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "kolibri1": (
        "kolibri1",
        {
            **OWN_HEADS,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 3,
            "num_experts": 6,
            "layer_types": KINDS,
            "sliding_window": 7,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "flex_olmo": ("flex_olmo", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmo2": ("olmo2", {"intermediate_size": 56}),
    "granite": ("granite", {"intermediate_size": 56, **GRANITE}),
    "granitemoeshared": (
        "granitemoeshared",
        {"intermediate_size": 24, "num_local_experts": 6, "shared_intermediate_size": 40, **GRANITE},
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox in turn": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "attention_bias": False}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2, "rope_parameters": STRETCHED}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": STRETCHED,
        },
    ),
    "deepseek_v2 lite": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, "n_group": 1, "topk_group": 1}),
}
"""Of each, one key or more of attention or block that no case below has."""
ONLY_FULL = set(ATTENTION_CASES) - {"glm4_moe", "exaone_moe", "gpt_oss", "deepseek_v3", "gpt_neox"}
"""Left to the long tests."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Experts as wide as the model: a transposed projection keeps its shape.
    "mixtral": ("mixtral", {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral tied": ("mixtral", {"intermediate_size": 24, "num_local_experts": 6, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe normalised": (
        "olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
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
    **ATTENTION_CASES,
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
            attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
            ffn_config={"hidden_size": 48, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
        )
    else:
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                value.normal_(0, 0.2)
            elif "norm" in name and value.ndim == 1:
                value.normal_(1, 0.25)
            elif "inv_freq" not in name and value.is_floating_point():
                value.normal_(0, (1 if value.ndim < 2 else value.shape[-1]) ** -0.5)
    return model


def save_model(case: str, folder: Path, **options: Any) -> Path:
    """Its folder, as published: a tensor for each expert."""
    build_model(case).save_pretrained(folder, **options)
    return folder
