"""Sizes of a microbatch on one rank: its tokens, and what comes to its experts. Arithmetic; loads no torch.

T tokens, E experts, K choices, R ranks that share whole experts. ``mesh.dispatch`` is settled here: not ``auto`` (see
:func:`moe_dtensor.estimate.dispatch.settle`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import comb

from moe_dtensor.config.resolve import GATED, expert_dp_ranks, expert_ranks, expert_shards, expert_takes, lent_experts
from moe_dtensor.config.schema import Config, Moe

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Sizes:
    """Sizes that all terms share."""

    whole: int
    """T."""
    own: int
    """t."""
    compute: int
    """Bytes of an element in ``training.param_dtype``."""
    wide: int
    """The same, at least float32: gates, logits of the router, statistics."""


def tokens(config: Config) -> Sizes:
    """Sizes of a microbatch on one rank of a resolved config."""
    training, mesh = config.training, config.mesh
    whole = training.microbatch_size * training.seq_len
    own = whole // mesh.tp if mesh.sequence_parallel else whole
    compute = BYTES[training.param_dtype]
    return Sizes(whole, own, compute, max(4, compute))


def columns(config: Config) -> int:
    """Columns of gates and ids: K, and E where tokens go to any number of experts."""
    return config.moe.num_experts if config.moe.router == "expert_choice" else config.moe.top_k


def repeats_tokens(config: Config) -> bool:
    """Whether tp ranks that share experts hold the same tokens; in an all-to-all each then sends its share of them."""
    mesh = config.mesh
    return mesh.tp > 1 and not mesh.sequence_parallel and mesh.experts != "dp"


def sent_tokens(config: Config) -> int:
    """Tokens that a rank dispatches in an all-to-all; without sequence parallelism padded to a multiple of tp."""
    own = tokens(config).own
    return -(-own // config.mesh.tp) if repeats_tokens(config) else own


def tokens_together(config: Config) -> int:
    """Tokens whose copies may come to a rank's experts; under all-gather their vectors are all at hand."""
    mesh, at = config.mesh, tokens(config)
    if mesh.dispatch == "all_to_all":
        return sent_tokens(config) * expert_ranks(config)
    groups = expert_dp_ranks(config)
    return {"tp": at.whole, "tp_hidden": at.whole, "dp": at.own * groups, "dp_tp": at.whole * groups}[mesh.experts]


def tokens_at_experts(config: Config, skewed: bool) -> int:
    """Vectors at hand at a rank's experts: all that are together, or those that an all-to-all brought."""
    if config.mesh.dispatch == "all_to_all" and not skewed:
        return round(sent_tokens(config) * distinct_ranks(config))
    return tokens_together(config)


def expert_rows(config: Config, skewed: bool) -> int:
    """Copies of tokens that come to a rank's experts in one MoE block: what ``moe.rows = exact`` makes room for.

    Balanced, each rank gets its share of the T * K copies. Skewed, all tokens prefer one rank's experts, and it gets
    ``min(K, E / R)`` of each, or as many as its experts take under a capacity or by their own choice. Copies of experts
    that it lends it gives away: the fewest where all its experts have as many.
    """
    moe, together, ranks = config.moe, tokens_together(config), expert_ranks(config)
    held, take = moe.num_experts // ranks, expert_takes(config)
    if not skewed:
        each = moe.top_k if take is None else moe.num_experts * take / (moe.group_sequences * config.training.seq_len)
        if moe.router != "expert_choice":
            each = min(each, moe.top_k)
        return round(together * each / ranks)
    most = together * min(columns(config), held)
    if take is not None:
        groups = expert_dp_ranks(config) * config.training.microbatch_size // moe.group_sequences
        most = min(most, held * min(together, take * groups))
    return max(expert_rows(config, False), _kept(config, most))


def _kept(config: Config, most: int) -> int:
    """What a rank with ``most`` copies has left at most, when it has given away what it can."""
    held = config.moe.num_experts // expert_ranks(config)
    return -(-most * (held - lent_experts(config)) // held)


def allocated_rows(config: Config, skewed: bool, rows: str | None = None) -> int:
    """Rows of copies that a rank makes room for in one MoE block under ``rows`` (None: ``moe.rows``).

    An all-to-all tells how many come. A rank that holds all experts, or a slice of each, takes T * K without asking.
    """
    held = config.moe.num_experts // expert_ranks(config)
    if config.mesh.dispatch == "all_to_all":
        return expert_rows(config, skewed)
    if expert_ranks(config) == 1 or (rows or config.moe.rows) == "worst":
        ranks, copies = expert_ranks(config), tokens_together(config) * columns(config)
        kept = _kept(config, tokens_together(config) * min(columns(config), held))
        return max(kept, -(-copies // ranks)) if lent_experts(config) else kept
    return expert_rows(config, skewed)


def expert_weights(config: Config) -> tuple[int, ...]:
    """Elements of one expert, by weight."""
    model, moe = config.model, config.moe
    gates = 2 if model.activation in GATED else 1
    up, down = gates * moe.hidden_dim * model.dim, moe.hidden_dim * model.dim
    return (up, down, gates * moe.hidden_dim) if moe.expert_bias else (up, down)


def lent_gradient_bytes(config: Config) -> int:
    """Bytes of an element of a lent expert's gradient on its way home: in ``reduce_dtype``, or wider."""
    training = config.training
    outside = config.mesh.experts in ("dp", "dp_tp") and expert_shards(config) == 1
    return max(BYTES[training.reduce_dtype], BYTES[training.dtype if outside else training.param_dtype])


def reads_device(config: Config) -> bool:
    """Whether the host reads from the device, in a block's forward pass, how many copies come."""
    if config.moe.num_experts == 0 or expert_ranks(config) == 1:
        return False
    return config.mesh.dispatch == "all_to_all" or config.moe.rows == "exact"


def distinct_ranks(config: Config) -> float:
    """Expected number of ranks that hold one of a token's experts, all choices alike likely.

    K different ones of E, or of those in the groups of experts that a token may choose from; under expert choice each
    expert takes a token by itself.
    """
    moe, ranks = config.moe, expert_ranks(config)
    held = moe.num_experts // ranks
    if moe.router == "expert_choice":
        size = moe.group_sequences * config.training.seq_len
        return ranks * (1 - (1 - (expert_takes(config) or 0) / size) ** held)
    if not moe.expert_groups:
        return ranks * (1 - _none_of(held, moe.num_experts, moe.top_k))
    return sum(1 - _none_in_groups(moe, rank * held, held) for rank in range(ranks))


def _none_of(held: int, experts: int, chosen: int) -> float:
    """Probability that none of ``held`` experts is among ``chosen`` different ones of ``experts``."""
    return comb(experts - held, chosen) / comb(experts, chosen)


@functools.lru_cache(maxsize=4096)
def _none_in_groups(moe: Moe, first: int, held: int) -> float:
    """The same for experts ``first`` to ``first + held - 1``, where a few groups are chosen first.

    A rank's experts lie in groups as (how many groups, how many of its experts in each); ways to keep some of them are
    counted one group after the other.
    """
    size = moe.num_experts // moe.expert_groups
    overlaps = [
        max(0, min(first + held, (group + 1) * size) - max(first, group * size)) for group in range(moe.expert_groups)
    ]
    # ways[kept][experts of this rank in kept groups]
    ways: dict[tuple[int, int], int] = {(0, 0): 1}
    for overlap in overlaps:
        more: dict[tuple[int, int], int] = {}
        for (kept, here), count in ways.items():
            for step in ((0, 0), (1, overlap)):
                key = (kept + step[0], here + step[1])
                if key[0] <= moe.expert_groups_kept:
                    more[key] = more.get(key, 0) + count
        ways = more
    of = moe.expert_groups_kept * size
    total = comb(moe.expert_groups, moe.expert_groups_kept)
    return sum(
        count / total * _none_of(here, of, moe.top_k)
        for (kept, here), count in ways.items()
        if kept == moe.expert_groups_kept
    )
