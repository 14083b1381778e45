"""Bytes that one rank sends in a step, axis by axis, by arithmetic. Loads no torch.

An all-gather or reduce-scatter of n bytes over p ranks sends ``n (p-1)/p`` from each, an all-reduce twice that (ring
algorithms; the least that any needs), an all-to-all the rows for other ranks, as many as are expected where all experts
are alike likely. Validation, checkpoints and single numbers (loss, norm) are left out.
``tests/estimate/test_plan_measured.py`` counts the same in real steps (:mod:`moe_dtensor.testing.bytes_sent`).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dtensor.config.resolve import (
    FORCED,
    attends_by_sequence,
    block_config,
    expert_shards,
    microbatches,
    moe_layers,
    num_stages,
    padded_vocab,
    rank_stages,
    routes_by_sequence,
    shard_ranks,
    stage_layers,
    stream_width,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import Axis, Move, Saved, Steps, border_steps, dispatch_steps, passes, settle
from moe_dtensor.estimate.memory import settle_accumulate
from moe_dtensor.estimate.shards import copies_over_dp, gathered_by_attention, reductions, stage_shards, summed_over_tp
from moe_dtensor.estimate.sizes import BYTES, columns, tokens


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, of the pipeline rank that sends most on each axis."""

    dp: int
    """FSDP: weights gathered in ``param_dtype``, gradients reduce-scattered in ``reduce_dtype``. Tokens to and from
    experts that dp shares, unless ``dp_tp`` sends them."""
    pp: int
    """Stage outputs and the gradients of stage inputs."""
    tp: int
    """Tokens, gates and choices into and out of split layers; vocabulary; gradients of weights that tp holds whole."""
    dp_tp: int
    """The all-to-all of experts over both axes (``mesh.experts = dp_tp``), to which they are one. Where one of the two
    has a single rank it counts under the other."""


def traffic(config: Config) -> Traffic:
    """Bytes by axis; ``config`` is resolved and knows its vocabulary."""
    config = settle_accumulate(settle(config))
    ranks = [rank_stages(config, pp_rank) for pp_rank in range(config.mesh.pp)]
    within = [activation_bytes(config, stages) for stages in ranks]
    return Traffic(
        dp=max(round(sent["dp"]) + fsdp_bytes(config, stages) for stages, sent in zip(ranks, within, strict=True)),
        pp=max(pp_bytes(config, stages) for stages in ranks),
        tp=max(
            round(sent["tp"]) + replicated_gradient_bytes(config, stages)
            for stages, sent in zip(ranks, within, strict=True)
        ),
        dp_tp=max(round(sent["dp_tp"]) for sent in within),
    )


def fsdp_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """FSDP over the blocks of a rank's stages, over dp.

    Weights that are freed after use are gathered for each microbatch's forward and backward, weights that stay once for
    the step (under a pipeline up to three stages on a rank; torch swaps more). Gradients are reduced with the last
    microbatch, or with each (``fsdp.accumulate``). Where dp does not divide a dimension, parts are padded to the same
    size. What several dp ranks hold alike is all-reduced among them once a step; of experts outside of FSDP that is
    all.
    """
    training, count, sent = config.training, microbatches(config), 0
    gathers = 2 * count if config.fsdp.reshard_after_forward == "always" else 1
    reduced = reductions(config) * BYTES[training.reduce_dtype]
    each = gathers * BYTES[training.param_dtype] + reduced
    wide = max(BYTES[training.reduce_dtype], BYTES[training.dtype])
    for shard in (shard for stage in stages for shard in stage_shards(config, stage)):
        row, alike = shard.row, copies_over_dp(config, shard.row)
        if row.fsdp:
            ranks = shard_ranks(config) if row.groups is None else expert_shards(config)
            sent += shard.local_size * each * (ranks - 1)
        summed = shard.local_size * (BYTES[training.reduce_dtype] if row.fsdp else wide)
        sent += 2 * summed * (alike - 1) // alike
    return sent


def pp_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """A stream of a rank's tokens for each microbatch, to each neighbouring stage on another rank."""
    at, last = tokens(config), num_stages(config) - 1
    neighbours = [other for stage in stages for other in (stage - 1, stage + 1) if 0 <= other <= last]
    sends = sum(other not in stages for other in neighbours)
    return sends * microbatches(config) * at.own * stream_width(config) * at.compute


def activation_bytes(config: Config, stages: tuple[int, ...]) -> dict[Axis, float]:
    """What the layers of a rank's stages send by axis: forward, recomputed, backward. ``mesh.dispatch`` is settled."""
    with_experts = moe_layers(config)
    sent: dict[Axis, float] = {"dp": 0.0, "tp": 0.0, "dp_tp": 0.0}
    for stage in stages:
        for layer in stage_layers(config, stage):
            for axis, size in passes(config, _block(block_config(config, layer), layer in with_experts)):
                sent[axis] += size
    sent["tp"] += _ends(config, stages)
    return {axis: size * microbatches(config) for axis, size in sent.items()}


def _ends(config: Config, stages: tuple[int, ...]) -> float:
    """Out of the embedding; into the head and, for the loss, maximum, sum and target of each token, or all logits for a
    loss of your own."""
    at, sent = tokens(config), 0.0
    others = (config.mesh.tp - 1) / config.mesh.tp
    border = 2 * at.whole * config.model.dim * at.compute * others
    if 0 in stages:
        sent += border
    if num_stages(config) - 1 in stages:
        own_loss = config.training.loss != "cross_entropy"
        logits = at.whole * padded_vocab(config) * at.compute * others
        sent += border + (logits if own_loss else 2 * 3 * at.whole * at.wide * others)
    # Multi-token prediction looks tokens up, and runs the head, once more for each depth.
    return sent * (1 + config.model.mtp_depth)


def _block(config: Config, is_moe: bool) -> Steps:
    """One block: attention, then a dense feed-forward, or router and experts."""
    attention = _attention(config)
    if not is_moe:
        return [*attention, *border_steps(config, [Saved()])]
    return [*attention, *_router(config), *dispatch_steps(config)]


def _attention(config: Config) -> Steps:
    """Of heads: tokens in and out. Of sequences: weights in, and their gradients back, in the wider of their dtype and
    ``reduce_dtype``."""
    if not attends_by_sequence(config):
        return border_steps(config, [*_qk_norm(config), Saved()])
    tp, at = config.mesh.tp, tokens(config)
    summed = max(at.compute, BYTES[config.training.reduce_dtype])
    others = [size * (tp - 1) / tp for size in gathered_by_attention(config)]
    return [*(Move("tp", size * at.compute, size * summed) for size in others), Saved()]


def _qk_norm(config: Config) -> Steps:
    """Over the whole width: squares of q and k, an all-reduce each way."""
    at, tp = tokens(config), config.mesh.tp
    both = 2 * 2 * at.whole * at.wide * (tp - 1) / tp
    return [Move("tp", both, both, kept=True)] if config.model.qk_norm == "full" else []


def _router(config: Config) -> Steps:
    """Where tp splits routing groups, what a choice goes by is gathered over it; without a gradient."""
    moe, mesh, at = config.moe, config.mesh, tokens(config)
    if not mesh.sequence_parallel:
        return []
    if routes_by_sequence(config):
        return [Saved()]
    each = 0
    if moe.router not in ("topk", *FORCED):
        each += moe.num_experts * at.wide
    if moe.balance_loss > 0 and moe.balance_over != "batch":
        each += columns(config) * 8
    if moe.capacity_factor > 0:
        each += columns(config) * (at.wide + 8)
    # Compiled, selective recomputation keeps the choice and need not gather what it went by.
    return [Move("tp", at.own * (mesh.tp - 1) * each, 0, config.compile.enable), Saved()]


def replicated_gradient_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """Whenever FSDP reduces, over tp, in ``reduce_dtype``: all-reduce of the gradients of weights that tp holds whole
    and sees a share of. Those of experts outside of FSDP once a step."""
    training, tp, sent = config.training, config.mesh.tp, 0
    wide = max(BYTES[training.reduce_dtype], BYTES[training.dtype])
    for stage in stages:
        for shard in stage_shards(config, stage):
            if summed_over_tp(config, shard.row):
                each = reductions(config) * BYTES[training.reduce_dtype] if shard.row.fsdp else wide
                sent += shard.used_size * each
    return 2 * sent * (tp - 1) // tp
