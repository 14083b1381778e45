"""Rows that several families share."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.attention_keys import Rope
from moe_dtensor.checkpoint.hugging_face.keys import AttentionScale, Choice, Fixed, Implied, Inverse, Same
from moe_dtensor.checkpoint.hugging_face.table import Key, Tensor

TIED = Choice("model.tie_embeddings", "tie_word_embeddings", ((False, False), (True, True)))
TIED_BY_DEFAULT = Choice("model.tie_embeddings", "tie_word_embeddings", ((True, True), (False, False)))


def sizes() -> tuple[Key, ...]:
    """Width, blocks, heads, vocabulary."""
    return (
        Same("model.dim", "hidden_size"),
        Same("model.num_layers", "num_hidden_layers"),
        Same("model.num_heads", "num_attention_heads"),
        Same("model.vocab_size", "vocab_size"),
    )


def body(eps: float = 1e-6, bias: str | None = "none", activation: str = "silu") -> tuple[Key, ...]:
    """Sizes and activation; heads' width and rotary positions differ by family.

    Args:
        eps: of the class.
        bias: what ``attention_bias = true`` means here; ``none``: it cannot be; None: the class has no such key.
        activation: ``hidden_act``.
    """
    plain = Fixed("attention_bias", False)
    biased = Choice("model.attention_bias", "attention_bias", ((False, "none"), (True, bias)))
    return (
        *sizes(),
        Same("model.norm_eps", "rms_norm_eps", eps),
        Fixed("hidden_act", activation),
        *(() if bias is None else (plain if bias == "none" else biased,)),
    )


ROPE = Rope()
MULTIPLIERS = (
    Same("model.embedding_scale", "embedding_multiplier", 1.0),
    Same("model.residual_scale", "residual_multiplier", 1.0),
    Inverse("model.logit_scale", "logits_scaling"),
    AttentionScale("attention_multiplier"),
)
"""Granite's."""
WEIGHTED_AFTER_SOFTMAX = (
    Implied("moe.score", "softmax"),
    Implied("moe.score_before_top_k", True),
    Implied("moe.normalize_gates", True),
)
"""Softmax over all experts, the K chosen divided by their sum; or softmax over the K chosen, which is the same."""


def embeddings(embed: str = "model.embed_tokens.weight", head: str = "lm_head.weight") -> tuple[Tensor, ...]:
    """Embedding and head, of padded rows here and real ones there."""
    return (Tensor("tok_embeddings.weight", "v d", embed), Tensor("output.weight", "v d", head))


EMBEDDINGS = embeddings()
FINAL_NORM = (Tensor("norm.weight", "d", "model.norm.weight"),)

NORMS = (
    Tensor("layers.{i}.attention_norm.weight", "d", "model.layers.{i}.input_layernorm.weight"),
    Tensor("layers.{i}.ffn_norm.weight", "d", "model.layers.{i}.post_attention_layernorm.weight"),
)
ATTENTION = (
    Tensor("layers.{i}.attention.wq.weight", "q d", "model.layers.{i}.self_attn.q_proj.weight"),
    Tensor("layers.{i}.attention.wk.weight", "q d", "model.layers.{i}.self_attn.k_proj.weight"),
    Tensor("layers.{i}.attention.wv.weight", "q d", "model.layers.{i}.self_attn.v_proj.weight"),
    Tensor("layers.{i}.attention.wo.weight", "d q", "model.layers.{i}.self_attn.o_proj.weight"),
)
INTERLEAVED_ATTENTION = (
    Tensor("layers.{i}.attention.wq.weight", "(h two c) d", "model.layers.{i}.self_attn.q_proj.weight", "(h c two) d"),
    Tensor("layers.{i}.attention.wk.weight", "(k two c) d", "model.layers.{i}.self_attn.k_proj.weight", "(k c two) d"),
    *ATTENTION[2:],
)
"""Rotary pairs stand beside each other in the file; here the halves of a head do."""
QKV_BIASES = tuple(
    Tensor(f"layers.{{i}}.attention.w{x}.bias", "q", f"model.layers.{{i}}.self_attn.{x}_proj.bias") for x in "qkv"
)
OUTPUT_BIAS = (Tensor("layers.{i}.attention.output_bias", "d", "model.layers.{i}.self_attn.o_proj.bias"),)
POST_NORMS = (
    Tensor("layers.{i}.attention_post_norm.weight", "d", "model.layers.{i}.post_attention_layernorm.weight"),
    Tensor("layers.{i}.ffn_post_norm.weight", "d", "model.layers.{i}.post_feedforward_layernorm.weight"),
)
"""Of blocks that normalise what attention and feed-forward give."""
QK_NORMS = (
    Tensor("layers.{i}.attention.q_norm.weight", "q", "model.layers.{i}.self_attn.q_norm.weight"),
    Tensor("layers.{i}.attention.k_norm.weight", "q", "model.layers.{i}.self_attn.k_norm.weight"),
)

ROTATED_LAST = {"c": "rotated last"}
"""Of a latent head the last dimensions are turned, their pairs beside each other in the file."""
LATENT_ATTENTION = (
    Tensor("layers.{i}.attention.wq_a.weight", "r d", "model.layers.{i}.self_attn.q_a_proj.weight"),
    Tensor("layers.{i}.attention.q_a_norm.weight", "r", "model.layers.{i}.self_attn.q_a_layernorm.weight"),
    Tensor(
        "layers.{i}.attention.wq_b.weight", "(h c) r", "model.layers.{i}.self_attn.q_b_proj.weight", order=ROTATED_LAST
    ),
    Tensor("layers.{i}.attention.wq.weight", "(h c) d", "model.layers.{i}.self_attn.q_proj.weight", order=ROTATED_LAST),
    Tensor(
        "layers.{i}.attention.wkv_a.weight",
        "(one c) d",
        "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight",
        order=ROTATED_LAST,
    ),
    Tensor("layers.{i}.attention.kv_a_norm.weight", "r", "model.layers.{i}.self_attn.kv_a_layernorm.weight"),
    Tensor("layers.{i}.attention.wkv_b.weight", "n r", "model.layers.{i}.self_attn.kv_b_proj.weight"),
    ATTENTION[3],
)

UP_WORDS = {"g": ("gate_proj", "up_proj")}


def feed_forward(native: str, file: str) -> tuple[Tensor, ...]:
    """A gated feed-forward, dense or shared: ``native`` and ``file`` are the modules' names."""
    return (
        Tensor(f"layers.{{i}}.{native}.gate.weight", "f d", f"model.layers.{{i}}.{file}.gate_proj.weight"),
        Tensor(f"layers.{{i}}.{native}.up.weight", "f d", f"model.layers.{{i}}.{file}.up_proj.weight"),
        Tensor(f"layers.{{i}}.{native}.down.weight", "d f", f"model.layers.{{i}}.{file}.down_proj.weight"),
    )


FEED_FORWARD = feed_forward("feed_forward", "mlp")
EXPERTS = (
    Tensor("layers.{i}.moe.experts.w_up", "e g f d", "model.layers.{i}.mlp.experts.{e}.{g}.weight", words=UP_WORDS),
    Tensor("layers.{i}.moe.experts.w_down", "e d f", "model.layers.{i}.mlp.experts.{e}.down_proj.weight"),
)


def router(file: str = "mlp.gate.weight") -> tuple[Tensor, ...]:
    """The router's weight."""
    return (Tensor("layers.{i}.moe.router.weight", "e d", f"model.layers.{{i}}.{file}"),)


def selection_bias(file: str, layout: str = "e") -> tuple[Tensor, ...]:
    """The bias that the choice sees; kept beside the parameters here, in float32 on both sides."""
    one = {"one": (0, 1)} if "one" in layout else {}
    return (Tensor("layers.{i}.moe.router.bias", "e", f"model.layers.{{i}}.{file}", layout, fixed=one),)


AHEAD = (
    Tensor("layers.{i}.mtp_embedding_norm.weight", "d", "model.layers.{i}.enorm.weight"),
    Tensor("layers.{i}.mtp_stream_norm.weight", "d", "model.layers.{i}.hnorm.weight"),
    Tensor("layers.{i}.mtp_projection.weight", "d m", "model.layers.{i}.eh_proj.weight"),
    Tensor("layers.{i}.mtp_norm.weight", "d", "model.layers.{i}.shared_head.norm.weight"),
)
"""Of multi-token prediction: blocks whose numbers go on after the last."""
COPIES = {
    "tok_embeddings.weight": "model.layers.{i}.embed_tokens.weight",
    "output.weight": "model.layers.{i}.shared_head.head.weight",
}
"""What such a block repeats."""
