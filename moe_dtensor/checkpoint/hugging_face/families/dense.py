"""Llama, Mistral and Qwen3 without experts."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import Fixed, HeadDim, Implied, KeyValueHeads, NoWindow, Same
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
        NoWindow(default=4096),
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
        NoWindow(switch=True, from_layer=True),
        pieces.TIED,
        Implied("model.qk_norm", "head"),
        HIDDEN,
    ),
    tensors=(*TENSORS, *pieces.QK_NORMS),
)

FAMILIES = (LLAMA, MISTRAL, QWEN3)
