"""Llama, Mistral, Qwen2, Qwen3, OLMo-2, OLMo-3, Granite and GPT-NeoX (Pythia): without experts."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope, Windows
from moe_dtensor.checkpoint.hugging_face.families import pieces
from moe_dtensor.checkpoint.hugging_face.keys import (
    Choice,
    EvenHeads,
    Fixed,
    HeadDim,
    Implied,
    KeyValueHeads,
    NoGroups,
    Same,
)
from moe_dtensor.checkpoint.hugging_face.table import Family, Tensor

HIDDEN = Same("model.hidden_dim", "intermediate_size")
TENSORS = (*pieces.EMBEDDINGS, *pieces.NORMS, *pieces.ATTENTION, *pieces.FEED_FORWARD, *pieces.FINAL_NORM)
POST_TENSORS = (
    *pieces.EMBEDDINGS,
    *pieces.POST_NORMS,
    *pieces.ATTENTION,
    *pieces.QK_NORMS,
    *pieces.FEED_FORWARD,
    *pieces.FINAL_NORM,
)

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
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    keys=(
        *pieces.body(1e-5),
        EvenHeads(),
        KeyValueHeads(),
        pieces.ROPE,
        pieces.TIED,
        Implied("model.qk_norm", "full"),
        Implied("model.norm_at", "post"),
        HIDDEN,
    ),
    tensors=POST_TENSORS,
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    keys=(
        *pieces.body(1e-5),
        EvenHeads(),
        KeyValueHeads(),
        Windows(kinds=True, default=4096, full_every=4),
        Rope(5e5, by_kind=True, in_4=True),
        pieces.TIED,
        Implied("model.qk_norm", "full"),
        Implied("model.norm_at", "post"),
        HIDDEN,
    ),
    tensors=POST_TENSORS,
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    keys=(
        *pieces.body(),
        EvenHeads(),
        KeyValueHeads(),
        pieces.ROPE,
        pieces.TIED,
        Fixed("mlp_bias", False),
        HIDDEN,
        *pieces.MULTIPLIERS,
    ),
    tensors=TENSORS,
)

BLOCK = "gpt_neox.layers.{i}."
FUSED = {part: {"three": (number, 3)} for number, part in enumerate("qkv")}
"""Of each head its query, key and value lie beside each other."""
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    keys=(
        *pieces.sizes(),
        Same("model.norm_eps", "layer_norm_eps", 1e-5),
        Fixed("hidden_act", "gelu"),
        Choice("model.attention_bias", "attention_bias", ((True, "all"), (False, "none"))),
        Choice("model.parallel_block", "use_parallel_residual", ((True, True), (False, False))),
        Implied("model.activation", "gelu"),
        Implied("model.norm", "layernorm"),
        Implied("model.norm_bias", True),
        Implied("model.ffn_bias", True),
        EvenHeads(),
        NoGroups(),
        Rope(also="rotary_emb_base", part=0.25, part_name="rotary_pct"),
        pieces.TIED,
        HIDDEN,
    ),
    tensors=(
        *pieces.embeddings("gpt_neox.embed_in.weight", "embed_out.weight"),
        *(
            Tensor(
                f"layers.{{i}}.attention.w{x}.{kind}", axes, f"{BLOCK}attention.query_key_value.{kind}", file, fixed=at
            )
            for x, at in FUSED.items()
            for kind, axes, file in (("weight", "(h c) d", "(h three c) d"), ("bias", "(h c)", "(h three c)"))
        ),
        Tensor("layers.{i}.attention.wo.weight", "d q", BLOCK + "attention.dense.weight"),
        Tensor("layers.{i}.attention.output_bias", "d", BLOCK + "attention.dense.bias"),
        *(
            Tensor(f"layers.{{i}}.{native}.{kind}", "d", f"{BLOCK}{file}.{kind}")
            for native, file in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
            for kind in ("weight", "bias")
        ),
        Tensor("layers.{i}.feed_forward.up.weight", "f d", BLOCK + "mlp.dense_h_to_4h.weight"),
        Tensor("layers.{i}.feed_forward.up.bias", "f", BLOCK + "mlp.dense_h_to_4h.bias"),
        Tensor("layers.{i}.feed_forward.down.weight", "d f", BLOCK + "mlp.dense_4h_to_h.weight"),
        Tensor("layers.{i}.feed_forward.output_bias", "d", BLOCK + "mlp.dense_4h_to_h.bias"),
        *(Tensor(f"norm.{kind}", "d", f"gpt_neox.final_layer_norm.{kind}") for kind in ("weight", "bias")),
    ),
)
