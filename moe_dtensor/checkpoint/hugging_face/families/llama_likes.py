"""Mixtral, OLMoE, FlexOlmo, Qwen3-MoE; GraniteMoE, its kind with a shared expert, and DBRX, which have the experts of a
block in one tensor: Llama's block with experts that an auxiliary loss balances.
"""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope, Windows
from moe_dtensor.checkpoint.hugging_face.expert_keys import AllBlocks, SparseStep
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import (
    Choice,
    Clip,
    EvenHeads,
    Fixed,
    HeadDim,
    Implied,
    KeyValueHeads,
    Same,
    Unused,
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

GRANITE_KEYS = (
    *pieces.body(),
    EvenHeads(),
    KeyValueHeads(),
    pieces.ROPE,
    pieces.TIED,
    Same("moe.num_experts", "num_local_experts", 8),
    Same("moe.top_k", "num_experts_per_tok", 2),
    Same("moe.hidden_dim", "intermediate_size"),
    AllBlocks(),
    *pieces.WEIGHTED_AFTER_SOFTMAX,
    *pieces.MULTIPLIERS,
)
GRANITE_TENSORS = (
    *pieces.EMBEDDINGS,
    *pieces.NORMS,
    *pieces.ATTENTION,
    *pieces.router("block_sparse_moe.router.layer.weight"),
    Tensor(
        "layers.{i}.moe.experts.w_up",
        "e g f d",
        "model.layers.{i}.block_sparse_moe.input_linear.weight",
        "e (g f) d",
    ),
    Tensor(
        "layers.{i}.moe.experts.w_down",
        "e d f",
        "model.layers.{i}.block_sparse_moe.output_linear.weight",
    ),
    *pieces.FINAL_NORM,
)
GRANITE_MOE = Family("granitemoe", "GraniteMoeForCausalLM", keys=GRANITE_KEYS, tensors=GRANITE_TENSORS)
SHARED = "model.layers.{i}.shared_mlp."
GRANITE_MOE_SHARED = Family(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    keys=(*GRANITE_KEYS, Same("moe.shared_hidden_dim", "shared_intermediate_size", 0)),
    tensors=(
        *GRANITE_TENSORS,
        Tensor("layers.{i}.moe.shared.gate.weight", "f d", SHARED + "input_linear.weight"),
        Tensor("layers.{i}.moe.shared.up.weight", "f d", SHARED + "input_linear.weight"),
        Tensor("layers.{i}.moe.shared.down.weight", "d f", SHARED + "output_linear.weight"),
    ),
)

BLOCK = "transformer.blocks.{i}."
ATTENTION_NORM = BLOCK + "norm_attn_norm."

DBRX = Family(
    "dbrx",
    "DbrxForCausalLM",
    keys=(
        Same("model.dim", "d_model"),
        Same("model.num_layers", "n_layers"),
        Same("model.num_heads", "n_heads"),
        Same("model.vocab_size", "vocab_size"),
        EvenHeads(),
        KeyValueHeads("attn_config.kv_n_heads", 1),
        Unused("num_key_value_heads"),
        Rope(10000.0, also="attn_config.rope_theta"),
        Clip("attn_config.clip_qkv", none=1e30),
        pieces.TIED,
        Implied("model.norm", "layernorm"),
        Implied("model.norm_eps", 1e-5),
        Same("moe.num_experts", "ffn_config.moe_num_experts"),
        Same("moe.top_k", "ffn_config.moe_top_k"),
        Same("moe.hidden_dim", "ffn_config.ffn_hidden_size"),
        Fixed("ffn_config.ffn_act_fn", {"name": "silu"}),
        Fixed("ffn_config.moe_normalize_expert_weights", 1.0),
        AllBlocks(),
        *pieces.WEIGHTED_AFTER_SOFTMAX,
    ),
    tensors=(
        *pieces.embeddings("transformer.wte.weight"),
        Tensor("layers.{i}.attention_norm.weight", "d", ATTENTION_NORM + "norm_1.weight"),
        Tensor("layers.{i}.ffn_norm.weight", "d", ATTENTION_NORM + "norm_2.weight"),
        Tensor("layers.{i}.attention.wq.weight", "q d", ATTENTION_NORM + "attn.Wqkv.weight"),
        Tensor("layers.{i}.attention.wk.weight", "q d", ATTENTION_NORM + "attn.Wqkv.weight"),
        Tensor("layers.{i}.attention.wv.weight", "q d", ATTENTION_NORM + "attn.Wqkv.weight"),
        Tensor("layers.{i}.attention.wo.weight", "d q", ATTENTION_NORM + "attn.out_proj.weight"),
        Tensor("layers.{i}.moe.router.weight", "e d", BLOCK + "ffn.router.layer.weight"),
        Tensor(
            "layers.{i}.moe.experts.w_up",
            "e g f d",
            BLOCK + "ffn.experts.mlp.{g}",
            "(e f) d",
            words={"g": ("w1", "v1")},
        ),
        Tensor("layers.{i}.moe.experts.w_down", "e d f", BLOCK + "ffn.experts.mlp.w2", "(e f) d"),
        Tensor("norm.weight", "d", "transformer.norm_f.weight"),
    ),
)
