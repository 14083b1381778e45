"""DeepSeek's and what is like them: shared experts, and but for DeepSeek-V2 a bias that only the choice sees.

With latent attention DeepSeek-V2, DeepSeek-V3, Kimi-K2, GLM-4.7-Flash; without Dots1, Hunyuan 3, Solar-Open,
Sarvam-MoE, ERNIE 4.5, Kolibri-1.
"""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Latent, Rope, Windows
from moe_dtensor.checkpoint.hugging_face.expert_keys import (
    AllBlocks,
    DenseFirst,
    GreedyGroups,
    Groups,
    Interval,
    LayerTypes,
    SharedExperts,
)
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import (
    Ahead,
    Choice,
    Fixed,
    HeadDim,
    Implied,
    KeyValueHeads,
    Same,
    Unused,
)
from moe_dtensor.checkpoint.hugging_face.table import Family, Key, Tensor

BIASED = Implied("moe.selection_bias", True, also=(False,))
SIGMOID = (Implied("moe.score", "sigmoid"), BIASED)


def routed(normalized: bool, scale: float, shared: int) -> tuple[Key, ...]:
    """Keys of the DeepSeek-V3 kind; the arguments are what the class takes where config.json is silent."""
    return (
        Same("moe.num_experts", ("n_routed_experts", "num_experts")),
        Same("moe.top_k", "num_experts_per_tok"),
        Same("moe.hidden_dim", "moe_intermediate_size"),
        SharedExperts(("n_shared_experts", "num_shared_experts"), shared),
        Same("moe.gate_scale", "routed_scaling_factor", scale),
        Choice("moe.normalize_gates", "norm_topk_prob", ((normalized, normalized), (not normalized, not normalized))),
        Groups(),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        *SIGMOID,
    )


DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    keys=(
        *pieces.body(),
        HeadDim(),
        KeyValueHeads(default=32),
        pieces.ROPE,
        Windows(from_layer=True, default=4096),
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        Same("model.hidden_dim", "intermediate_size"),
        *routed(normalized=False, scale=1.0, shared=0),
        DenseFirst(),
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router(),
        *pieces.selection_bias("mlp.gate.e_score_correction_bias"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
)

SOLAR_OPEN = Family(
    "solar_open",
    "SolarOpenForCausalLM",
    keys=(
        *pieces.body(1e-5),
        HeadDim(128),
        KeyValueHeads(default=8),
        Rope(1e6),
        pieces.TIED,
        *routed(normalized=True, scale=1.0, shared=1),
        AllBlocks(),
        Fixed("first_k_dense_replace", 0),
        Unused("intermediate_size"),
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.router(),
        *pieces.selection_bias("mlp.gate.e_score_correction_bias"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
        *pieces.FINAL_NORM,
    ),
)

HY_V3 = Family(
    "hy_v3",
    "HYV3ForCausalLM",
    keys=(
        *pieces.body(1e-5),
        HeadDim(128),
        KeyValueHeads(default=8),
        Rope(11158840.0),
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        Fixed("mlp_bias", False),
        Same("model.hidden_dim", "intermediate_size", 13312),
        Same("moe.num_experts", "num_experts", 192),
        Same("moe.top_k", "num_experts_per_tok", 8),
        Same("moe.hidden_dim", "moe_intermediate_size", 1536),
        SharedExperts(("num_shared_experts",), 1),
        Same("moe.gate_scale", "router_scaling_factor", 2.826),
        Implied("moe.normalize_gates", True),
        LayerTypes(),
        *SIGMOID,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router("mlp.router.gate.weight"),
        *pieces.selection_bias("mlp.expert_bias"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_mlp"),
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
)

SARVAM_MOE = Family(
    "sarvam_moe",
    "Glm4MoeForCausalLM",
    keys=(
        *pieces.body(),
        HeadDim(64),
        KeyValueHeads(default=4),
        Rope(8e6),
        pieces.TIED,
        Choice("model.qk_norm", "use_qk_norm", ((True, "head"), (False, "none"))),
        Same("model.hidden_dim", "intermediate_size", 8192),
        *routed(normalized=True, scale=2.5, shared=1),
        DenseFirst(1),
    ),
    tensors=(
        *pieces.embeddings("model.word_embeddings.weight"),
        *pieces.NORMS,
        Tensor("layers.{i}.attention.wq.weight", "q d", "model.layers.{i}.attention.query_key_value.weight"),
        Tensor("layers.{i}.attention.wk.weight", "q d", "model.layers.{i}.attention.query_key_value.weight"),
        Tensor("layers.{i}.attention.wv.weight", "q d", "model.layers.{i}.attention.query_key_value.weight"),
        Tensor("layers.{i}.attention.wo.weight", "d q", "model.layers.{i}.attention.dense.weight"),
        Tensor("layers.{i}.attention.q_norm.weight", "q", "model.layers.{i}.attention.query_layernorm.weight"),
        Tensor("layers.{i}.attention.k_norm.weight", "q", "model.layers.{i}.attention.key_layernorm.weight"),
        *pieces.router(),
        *pieces.selection_bias("mlp.gate.expert_bias"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
)

ERNIE_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    keys=(
        *pieces.body(1e-5),
        HeadDim(),
        KeyValueHeads(default=4),
        Rope(5e5),
        pieces.TIED_BY_DEFAULT,
        Fixed("use_bias", False),
        Same("model.hidden_dim", "intermediate_size", 12288),
        Same("moe.num_experts", "moe_num_experts", 64),
        Same("moe.top_k", "moe_k", 6),
        Same("moe.hidden_dim", "moe_intermediate_size", 1536),
        SharedExperts(("moe_num_shared_experts",), 2),
        Fixed("moe_norm_min", 1e-12),
        Interval(),
        *pieces.WEIGHTED_AFTER_SOFTMAX,
        BIASED,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.INTERLEAVED_ATTENTION,
        *pieces.router(),
        *pieces.selection_bias("mlp.moe_statics.e_score_correction_bias", "one e"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
)

KOLIBRI1 = Family(
    "kolibri1",
    "Kolibri1ForCausalLM",
    keys=(
        *pieces.body(bias=None),
        HeadDim(128),
        KeyValueHeads(default=4),
        Windows(kinds=True, default=513, full_every=5, unrotated=True),
        pieces.ROPE,
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        Implied("model.norm_at", "both"),
        Same("moe.num_experts", ("num_experts", "num_local_experts"), 384),
        Same("moe.top_k", "num_experts_per_tok", 6),
        Same("moe.hidden_dim", "moe_intermediate_size", 512),
        Same("moe.shared_hidden_dim", "shared_expert_intermediate_size", 512),
        AllBlocks(),
        # The bias is added to the logits, of which the chosen ones become gates.
        Implied("moe.score_before_top_k", False),
        Choice("moe.normalize_gates", "norm_topk_prob", ((False, False), (True, True))),
        *SIGMOID,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        Tensor("layers.{i}.attention_post_norm.weight", "d", "model.layers.{i}.post_attn_norm.weight"),
        Tensor("layers.{i}.ffn_post_norm.weight", "d", "model.layers.{i}.post_ffn_norm.weight"),
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router(),
        *pieces.selection_bias("moe.router.expert_bias"),
        *pieces.EXPERTS,
        *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
        *pieces.FINAL_NORM,
    ),
)

LATENT_UNBIASED = (
    *pieces.EMBEDDINGS,
    *pieces.NORMS,
    *pieces.LATENT_ATTENTION,
    *pieces.router(),
    *pieces.EXPERTS,
    *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
    *pieces.FEED_FORWARD,
    *pieces.FINAL_NORM,
)
LATENT_TENSORS = (*LATENT_UNBIASED, *pieces.selection_bias("mlp.gate.e_score_correction_bias"), *pieces.AHEAD)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    keys=(
        *pieces.body(),
        Latent(),
        pieces.ROPE,
        pieces.TIED,
        Same("model.hidden_dim", "intermediate_size", 18432),
        *routed(normalized=True, scale=2.5, shared=1),
        DenseFirst(3),
        Ahead(),
    ),
    tensors=LATENT_TENSORS,
    copies=pieces.COPIES,
)
KIMI_K2 = Family(
    "kimi_k2", "DeepseekV3ForCausalLM", keys=DEEPSEEK_V3.keys, tensors=LATENT_TENSORS, copies=pieces.COPIES
)

DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys=(
        *pieces.body(),
        Latent(),
        pieces.ROPE,
        pieces.TIED,
        Fixed("mlp_bias", False),
        Same("model.hidden_dim", "intermediate_size", 11008),
        Same("moe.num_experts", "n_routed_experts", 64),
        Same("moe.top_k", "num_experts_per_tok"),
        Same("moe.hidden_dim", "moe_intermediate_size", 1407),
        SharedExperts(("n_shared_experts",), 2),
        Same("moe.gate_scale", "routed_scaling_factor", 1.0),
        Implied("moe.score", "softmax"),
        Fixed("scoring_func", "softmax"),
        Fixed("norm_topk_prob", False),
        GreedyGroups(),
        DenseFirst(0),
    ),
    tensors=LATENT_UNBIASED,
)

GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    keys=(
        *pieces.body(1e-5),
        Latent(q_rank=768, nope=192, value=256),
        Rope(),
        pieces.TIED,
        Same("model.hidden_dim", "intermediate_size", 10240),
        *routed(normalized=True, scale=1.8, shared=1),
        LayerTypes(),
        Ahead(),
    ),
    tensors=LATENT_TENSORS,
    copies=pieces.COPIES,
)
