"""Llama, Mistral, Qwen2, Qwen3 and OLMo-3: without experts."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope, Windows
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import EvenHeads, Fixed, HeadDim, Implied, KeyValueHeads, Same
from moe_dtensor.checkpoint.hugging_face.table import Family

HIDDEN = Same("model.hidden_dim", "intermediate_size")
TENSORS = (*pieces.EMBEDDINGS, *pieces.NORMS, *pieces.ATTENTION, *pieces.FEED_FORWARD, *pieces.FINAL_NORM)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    keys=(*pieces.body(), HeadDim(), KeyValueHeads(), pieces.ROPE, pieces.TIED, Fixed("mlp_bias", False), HIDDEN),
    tensors=TENSORS,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    keys=(
        *pieces.body(),
        HeadDim(),
        KeyValueHeads(default=8),
        pieces.ROPE,
        Windows(default=4096),
        pieces.TIED,
        HIDDEN,
    ),
    tensors=TENSORS,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    keys=(
        *pieces.body(),
        HeadDim(128),
        KeyValueHeads(default=32),
        pieces.ROPE,
        Windows(switch=True, from_layer=True, kinds=True),
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        HIDDEN,
    ),
    tensors=(*TENSORS, *pieces.QK_NORMS),
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    keys=(
        *pieces.body(bias=None),
        EvenHeads(),
        KeyValueHeads(default=32),
        pieces.ROPE,
        Windows(switch=True, from_layer=True, kinds=True, default=4096),
        pieces.TIED,
        Implied("model.attention_bias", "qkv"),
        HIDDEN,
    ),
    tensors=(*TENSORS, *pieces.QKV_BIASES),
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    keys=(
        *pieces.body(1e-5),
        EvenHeads(),
        KeyValueHeads(),
        Windows(kinds=True, default=4096, full_every=4),
        Rope(5e5, by_kind=True),
        pieces.TIED,
        Implied("model.qk_norm", "full"),
        Implied("model.norm_at", "post"),
        HIDDEN,
    ),
    tensors=(
        *pieces.EMBEDDINGS,
        *pieces.POST_NORMS,
        *pieces.ATTENTION,
        *pieces.QK_NORMS,
        *pieces.FEED_FORWARD,
        *pieces.FINAL_NORM,
    ),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO3)
