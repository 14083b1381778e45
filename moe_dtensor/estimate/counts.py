"""Parameters and FLOPs of a config, by arithmetic. Loads no torch."""

from __future__ import annotations

from moe_dtensor.config.resolve import GATED, moe_layers, padded_vocab
from moe_dtensor.config.schema import Config


def parameters(config: Config) -> tuple[int, int]:
    """Parameters of the whole model, and those that one token meets (K experts and not E): ``(total, active)``.

    The embedding counts in both, though a token only reads a row of it.
    """
    model, moe = config.model, config.moe
    embeddings = padded_vocab(config) * model.dim * (1 if model.tie_embeddings else 2)
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    norms = {"none": 0, "head": 2 * model.head_dim, "full": heads + kv_heads}[model.qk_norm]
    block = model.dim * (2 * heads + 2 * kv_heads) + norms + 2 * model.dim
    matrices = 3 if model.activation in GATED else 2
    dense, expert = matrices * model.dim * model.hidden_dim, matrices * model.dim * moe.hidden_dim
    num_moe = len(moe_layers(config))
    always = embeddings + model.dim + model.num_layers * block + (model.num_layers - num_moe) * dense
    always += num_moe * (moe.num_experts * model.dim + moe.num_shared_experts * expert)
    return always + num_moe * moe.num_experts * expert, always + num_moe * moe.top_k * expert


def flops_per_token(config: Config) -> float:
    """FLOPs of one token, forward and backward: 6 per active weight of a matrix product, and the attention products.

    As in Kaplan et al. (arXiv:2001.08361) and PaLM (arXiv:2204.02311): the embedding lookup costs nothing, the head
    does; causal attention counts half of the S x S scores; nothing is added for recomputation.
    """
    model = config.model
    _, active = parameters(config)
    lookup = 0 if model.tie_embeddings else padded_vocab(config) * model.dim
    attention = 6 * model.num_layers * model.num_heads * model.head_dim * config.training.seq_len
    return 6.0 * (active - lookup) + attention
