"""DeepSeek-V2, DeepSeek-V3, Kimi-K2, GLM-4.7-Flash: latent attention."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Latent, Rope
from moe_dtensor.checkpoint.hugging_face.expert_keys import DenseFirst, GreedyGroups, LayerTypes, SharedExperts
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.families.bias_balanced import routed
from moe_dtensor.checkpoint.hugging_face.keys import Ahead, Fixed, Implied, Same
from moe_dtensor.checkpoint.hugging_face.table import Family

UNBIASED = (
    *pieces.EMBEDDINGS,
    *pieces.NORMS,
    *pieces.LATENT_ATTENTION,
    *pieces.router(),
    *pieces.EXPERTS,
    *pieces.feed_forward("moe.shared", "mlp.shared_experts"),
    *pieces.FEED_FORWARD,
    *pieces.FINAL_NORM,
)
TENSORS = (*UNBIASED, *pieces.selection_bias("mlp.gate.e_score_correction_bias"), *pieces.AHEAD)

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
    tensors=TENSORS,
    copies=pieces.COPIES,
)
KIMI_K2 = Family("kimi_k2", "DeepseekV3ForCausalLM", keys=DEEPSEEK_V3.keys, tensors=TENSORS, copies=pieces.COPIES)

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
    tensors=UNBIASED,
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
    tensors=TENSORS,
    copies=pieces.COPIES,
)

FAMILIES = (DEEPSEEK_V3, KIMI_K2, DEEPSEEK_V2, GLM4_MOE_LITE)
