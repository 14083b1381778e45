"""Bytes that one rank sends in a step, axis by axis, by arithmetic. Loads no torch.

An all-gather or reduce-scatter of n bytes over p ranks sends ``n (p-1)/p`` from each, an all-reduce twice that (ring
algorithms; the least that any needs). Validation, checkpoints and single numbers (loss, norm) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_dtensor.config.resolve import microbatches, moe_layers, num_stages, padded_vocab, rank_stages, stage_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.activations import BYTES, tokens
from moe_dtensor.parallel.shares import stage_shares


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, of the pipeline rank that sends most on each axis."""

    dp: int
    """FSDP: weights gathered in ``param_dtype``, gradients reduce-scattered in ``reduce_dtype``."""
    pp: int
    """Stage outputs and the gradients of stage inputs."""
    tp: int
    """Tokens, gates and choices into and out of split layers; vocabulary; gradients of weights that tp holds whole."""


def traffic(config: Config) -> Traffic:
    """Bytes by axis; ``config`` is resolved and knows its vocabulary."""
    ranks = [rank_stages(config, pp_rank) for pp_rank in range(config.mesh.pp)]
    return Traffic(
        dp=max(dp_bytes(config, stages) for stages in ranks),
        pp=max(pp_bytes(config, stages) for stages in ranks),
        tp=max(tp_bytes(config, stages) for stages in ranks),
    )


def dp_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """FSDP over the blocks of a rank's stages.

    Weights that are freed after use are gathered for each microbatch's forward and backward, weights that stay
    until after the backward once for each microbatch, and under a pipeline once for the step (up to three stages on
    a rank; torch swaps more). Gradients are reduced with the last microbatch.
    """
    training, dp, count = config.training, config.mesh.dp, microbatches(config)
    whole = sum(share.tp_size for stage in stages for share in stage_shares(config, stage))
    again = 2 if config.fsdp.reshard_after_forward == "always" else 1
    gathers = 1 if config.mesh.pp > 1 else again * count
    return whole * (gathers * BYTES[training.param_dtype] + BYTES[training.reduce_dtype]) * (dp - 1) // dp


def pp_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """A stream of a rank's tokens for each microbatch, to each neighbouring stage on another rank."""
    at, last = tokens(config), num_stages(config) - 1
    neighbours = [other for stage in stages for other in (stage - 1, stage + 1) if 0 <= other <= last]
    sends = sum(other not in stages for other in neighbours)
    return sends * microbatches(config) * at.own * config.model.dim * at.compute


def tp_bytes(config: Config, stages: tuple[int, ...]) -> int:
    """All collectives over tp in a rank's stages, forward, recomputed, and backward."""
    tp, last = config.mesh.tp, num_stages(config) - 1
    if tp == 1:
        return 0
    at, with_experts = tokens(config), moe_layers(config)
    border = _border(config)
    each = sum(_block(config, layer in with_experts) for stage in stages for layer in stage_layers(config, stage))
    if 0 in stages:  # out of the embedding
        each += border
    if (
        last in stages
    ):  # into the head; then maximum, sum and target of each token, or all logits for a loss of your own
        own_loss = config.training.loss != "cross_entropy"
        logits = at.whole * padded_vocab(config) * at.compute
        each += border + (logits if own_loss else 2 * 3 * at.whole * at.wide)
    return (each * microbatches(config) + _replicated_gradients(config, stages)) * (tp - 1) // tp


def _border(config: Config) -> int:
    """A border of a split layer, forward and backward: all-gather and reduce-scatter, or one all-reduce. The same."""
    at = tokens(config)
    return 2 * at.whole * config.model.dim * at.compute


def _block(config: Config, is_moe: bool) -> int:
    """One block and microbatch, before the factor (tp - 1) / tp.

    Four borders. Recomputation enters both layers again (without sequence parallelism that sends nothing), and in full
    also leaves attention again; it stops before it would leave the second layer.
    """
    model, moe, at = config.model, config.moe, tokens(config)
    split_sequence, mode = config.mesh.sequence_parallel, config.activation_checkpoint.mode
    stream = at.whole * model.dim * at.compute
    moved = 4 * _border(config)
    enter = (2 if split_sequence else 0) * stream
    leave = (1 if split_sequence else 2) * stream
    moved += {"none": 0, "selective": enter}.get(mode, enter + leave)
    if model.qk_norm == "full":  # mean squares of q and k: an all-reduce each way
        moved += 2 * 2 * (2 + (mode == "full")) * at.whole * at.wide
    if not is_moe:
        return moved
    runs = 1 if mode == "none" else 2
    gates = at.whole * moe.top_k * at.wide
    moved += (runs + 1) * gates if split_sequence else 2 * gates
    if split_sequence:
        moved += runs * at.whole * moe.top_k * 8
        # Compiled, selective recomputation keeps the choice and need not gather what it went by.
        rounds = 1 if mode == "selective" and config.compile.enable else runs
        moved += rounds * at.whole * moe.num_experts * at.wide if moe.router != "topk" else 0
    return moved


def _replicated_gradients(config: Config, stages: tuple[int, ...]) -> int:
    """Once a step: all-reduce of the gradients of weights that tp holds whole and sees a share of."""
    shared = 0
    for stage in stages:
        for share in stage_shares(config, stage):
            partial = share.row.gradient == "heads" or (
                share.row.gradient == "tokens" and config.mesh.sequence_parallel
            )
            shared += share.tp_size if share.row.tp is None and partial else 0
    return 2 * shared * BYTES[config.training.reduce_dtype]
