"""Mixtral, OLMoE, FlexOlmo, Qwen3-MoE: Llama's block with experts that an auxiliary loss balances."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope, Windows
from moe_dtensor.checkpoint.hugging_face.expert_keys import AllBlocks, SparseStep
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import (
    Choice,
    Clip,
    EvenHeads,
    HeadDim,
    Implied,
    KeyValueHeads,
    Same,
)
from moe_dtensor.checkpoint.hugging_face.table import Family, Tensor

NORMALIZED = Choice("moe.normalize_gates", "norm_topk_prob", ((False, False), (True, True)))

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    keys=(
        *pieces.body(1e-5),
        HeadDim(),
        KeyValueHeads(default=8),
        Rope(1e6),
        Windows(),
        pieces.TIED,
        Same("moe.num_experts", ("num_local_experts", "num_experts"), 8),
        Same("moe.top_k", "num_experts_per_tok", 2),
        Same("moe.hidden_dim", "intermediate_size"),
        AllBlocks(),
        *pieces.WEIGHTED_AFTER_SOFTMAX,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.router("block_sparse_moe.gate.weight"),
        Tensor(
            "layers.{i}.moe.experts.w_up",
            "e g f d",
            "model.layers.{i}.block_sparse_moe.experts.{e}.{g}.weight",
            words={"g": ("w1", "w3")},
        ),
        Tensor("layers.{i}.moe.experts.w_down", "e d f", "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"),
        *pieces.FINAL_NORM,
    ),
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    keys=(
        *pieces.body(1e-5),
        EvenHeads(),
        KeyValueHeads(),
        pieces.ROPE,
        pieces.TIED,
        Clip("clip_qkv"),
        Implied("model.qk_norm", "full"),
        Same("moe.num_experts", ("num_experts", "num_local_experts"), 64),
        Same("moe.top_k", "num_experts_per_tok", 8),
        Same("moe.hidden_dim", "intermediate_size"),
        AllBlocks(),
        Implied("moe.score", "softmax"),
        NORMALIZED,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router(),
        *pieces.EXPERTS,
        *pieces.FINAL_NORM,
    ),
    published={"moe.normalize_gates": (False,), "model.norm_eps": (1e-5,)},
)

FLEX_OLMO = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    keys=(
        *pieces.body(),
        EvenHeads(),
        KeyValueHeads(),
        Rope(5e5),
        pieces.TIED,
        Implied("model.qk_norm", "full"),
        Implied("model.norm_at", "post"),
        Same("moe.num_experts", ("num_experts", "num_local_experts"), 7),
        Same("moe.top_k", "num_experts_per_tok", 5),
        Same("moe.hidden_dim", "intermediate_size", 11008),
        AllBlocks(),
        Implied("moe.score", "softmax"),
        NORMALIZED,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.POST_NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router(),
        *pieces.EXPERTS,
        *pieces.FINAL_NORM,
    ),
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    keys=(
        *pieces.body(),
        HeadDim(),
        KeyValueHeads(default=4),
        pieces.ROPE,
        Windows(switch=True, from_layer=True, kinds=True),
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        Same("model.hidden_dim", "intermediate_size", 6144),
        Same("moe.num_experts", ("num_experts", "num_local_experts"), 128),
        Same("moe.top_k", "num_experts_per_tok", 8),
        Same("moe.hidden_dim", "moe_intermediate_size", 768),
        SparseStep(),
        Implied("moe.score", "softmax"),
        NORMALIZED,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.router(),
        *pieces.EXPERTS,
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
    published={"moe.normalize_gates": (True,)},
)

FAMILIES = (MIXTRAL, OLMOE, QWEN3_MOE, FLEX_OLMO)
