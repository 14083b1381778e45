"""Parameters and FLOPs of a config, by arithmetic. Loads no torch."""

from __future__ import annotations

from moe_dtensor.config.resolve import block_config, padded_vocab
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.attention import score_flops_per_token
from moe_dtensor.estimate.shards import all_shares


def parameters(config: Config) -> tuple[int, int]:
    """Parameters of the whole model, and those that one token meets (K experts and not E): ``(total, active)``.

    The embedding counts in both, though a token only reads a row of it.
    """
    sizes = {share.name: share.size for share in all_shares(config)}
    total, unmet = sum(sizes.values()), 0
    for name, size in sizes.items():
        if ".experts." in name:
            moe = block_config(config, int(name.split(".")[1])).moe
            unmet += size // moe.num_experts * (moe.num_experts - moe.top_k)
    return total, total - unmet


def flops_per_token(config: Config) -> float:
    """FLOPs of one token, forward and backward: 6 per active weight of a matrix product, and the attention products.

    As in Kaplan et al. (arXiv:2001.08361) and PaLM (arXiv:2204.02311): the embedding lookup costs nothing, the head
    does; causal attention counts half of the S x S scores, or what a window leaves of them; nothing is added for
    recomputation.
    """
    model = config.model
    _, active = parameters(config)
    lookup = 0 if model.tie_embeddings else padded_vocab(config) * model.dim
    # Multi-token prediction runs the head once more for each depth.
    active += model.mtp_depth * padded_vocab(config) * model.dim
    return 6.0 * (active - lookup) + score_flops_per_token(config)
