"""Peak memory of a rank's GPU, by arithmetic. Loads no torch.

The peak of a step is in the backward pass of a microbatch, while activations of others in flight wait. Nothing here
is fitted: every term is a tensor that exists, and their sum is within 5 % of what ``bench train`` measured on an
H100 (``docs/plan.md``). Not counted: NCCL's buffers, the CUDA context, what the allocator holds and does not use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moe_dtensor.config.resolve import (
    INTERLEAVED,
    expert_ranks,
    expert_shards,
    lent_experts,
    microbatches,
    moe_layers,
    num_stages,
    rank_stages,
    shard_ranks,
    stage_layers,
    state_dtype,
    stream_width,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import settle
from moe_dtensor.estimate.saved_tensors import block_bytes, head_bytes
from moe_dtensor.estimate.shards import ParameterShard, accumulates, stage_shards, summed_over_tp
from moe_dtensor.estimate.sizes import BYTES, expert_weights, lent_gradient_bytes, tokens

CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that torch gives cuBLAS on Hopper, for each thread that calls it: forward, and autograd's backward (torch's
notes on CUDA semantics, "cuBLAS workspaces"; about 8 MiB on older cards)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The peak is the sum of all but the moments, of which the largest counts."""

    weights: int
    """Master weights in ``training.dtype``, and their 16 low bits under ``optimizer.rounding = remainder``."""
    gradients: int
    """Gradients. While microbatches accumulate whole (``fsdp.accumulate``) they are whole over dp, in ``reduce_dtype``;
    else a rank's shard. Those of experts outside of FSDP are a rank's shard, in ``training.dtype``."""
    moments: int
    """AdamW's two."""
    compute_copy: int
    """Weights in ``param_dtype``, whole over dp: of all blocks if they stay gathered, else of two (one is fetched
    ahead), the embedding and the head."""
    expert_copy: int
    """The same of experts outside of FSDP: a rank's shard, for good; none where both dtypes are one."""
    activations: int
    """Kept by autograd, of all microbatches in flight."""
    buffers: int
    """Receive buffers of the pipeline, one for each microbatch and direction; and what one-sided dispatch needs."""
    workspaces: int
    """cuBLAS."""
    at_loss: int
    """Moment: logits, and the head's two gradients. On the last stage."""
    at_block: int
    """Moment: a block's backward pass: what it recomputes, gradients of activations and weights (of experts outside of
    FSDP one of them in both dtypes, on its way into the sum; of lent experts also what others computed)."""
    at_reduce: int
    """Moment: a block's gradients on their way into the reduce-scatter, its activations just freed."""
    one_backward: bool = False
    """The step is one microbatch: gradients come as activations go, and of the two the larger counts."""

    @property
    def peak(self) -> int:
        """Highest sum of all."""
        lasting = self.weights + self.moments + self.compute_copy + self.expert_copy + self.buffers + self.workspaces
        both = self.gradients, self.activations
        lasting += max(both) if self.one_backward else sum(both)
        return lasting + max(self.at_loss, self.at_block, self.at_reduce)


def fullest_rank(config: Config, skewed: bool = False) -> tuple[int, Memory]:
    """The pipeline rank with the highest peak, and its memory. ``config`` is resolved and knows its vocabulary."""
    ranks = [rank_memory(config, pp_rank, skewed) for pp_rank in range(config.mesh.pp)]
    highest = max(range(config.mesh.pp), key=lambda i: ranks[i].peak)
    return highest, ranks[highest]


def settle_accumulate(config: Config) -> Config:
    """The config with ``fsdp.accumulate`` as it will run: not ``auto``, and ``whole`` where sharding saves nothing.

    ``auto`` is ``whole`` where the peak, tokens spread evenly over experts, is within ``mesh.device_memory``, or where
    ``training.dtype`` is narrower than ``reduce_dtype``, so that shards would lose digits.
    """

    def settled(name: Literal["whole", "sharded"]) -> Config:
        return replace(config, fsdp=replace(config.fsdp, accumulate=name))

    whole, training = settled("whole"), config.training
    if (
        config.compile.cuda_graph
        or config.fsdp.accumulate == "whole"
        or not accumulates(whole)
        or shard_ranks(config) == 1
    ):
        return whole
    if config.fsdp.accumulate == "sharded":
        return config
    fits = fullest_rank(whole)[1].peak <= config.mesh.device_memory * 2**30
    loses_digits = BYTES[training.dtype] < BYTES[training.reduce_dtype]
    return whole if fits or loses_digits else settled("sharded")


def rank_memory(config: Config, pp_rank: int, skewed: bool = False) -> Memory:
    """Memory of a pipeline rank: of the dp and tp rank that holds most, if parameters do not split evenly.

    Args:
        config: resolved, with ``model.vocab_size``.
        pp_rank: which.
        skewed: all tokens prefer this rank's experts, in every block.
    """
    config = settle_accumulate(settle(config))
    alive = in_flight(config, pp_rank)
    shards = [shard for stage in alive for shard in stage_shards(config, stage)]
    training, on_gpu = config.training, not config.fsdp.cpu_offload
    compute = BYTES[training.param_dtype]
    stored = sum(shard.local_size for shard in shards) * BYTES[training.dtype] * on_gpu
    remainder = stored // BYTES[training.dtype] * 2 if config.optimizer.rounding == "remainder" else 0
    own = sum(shard.local_size for shard in shards if not shard.row.fsdp)
    own_stored = own * BYTES[training.dtype]
    whole = sum(shard.used_size for shard in shards if shard.row.fsdp)
    at_loss, at_block, at_reduce = _moments(config, shards, alive, skewed)
    return Memory(
        weights=stored + remainder,
        gradients=whole * BYTES[training.reduce_dtype] + own_stored if accumulates(config) else stored,
        moments=2 * stored * BYTES[state_dtype(config)] // BYTES[training.dtype],
        compute_copy=_gathered(config, shards) * compute,
        expert_copy=own * compute if _cast_bytes(config) else 0,
        activations=sum(count * _stage_kept(config, stage, skewed) for stage, count in alive.items()),
        buffers=_receive_buffers(config, alive) + _peers_rooms(config),
        workspaces=2 * CUBLAS_WORKSPACE,
        at_loss=at_loss,
        at_block=at_block,
        at_reduce=at_reduce,
        one_backward=microbatches(config) == 1 and config.mesh.pp == 1 and not config.compile.cuda_graph,
    )


def in_flight(config: Config, pp_rank: int) -> dict[int, int]:
    """For each stage of a rank, the microbatches whose activations are alive when most are.

    p are the pipeline ranks, v the stages on one rank, m the microbatches of a step. Warm-up forwards as
    torch.distributed.pipelining lays them out, and one more: GPipe m; 1F1B one for each stage from here on; interleaved
    (v-1) rounds of p and twice (zero-bubble: once) the ranks after this one, there also the microbatches whose weight
    gradients wait; ZBV 2p stage passes, DualPipeV 2p+1 (github.com/deepseek-ai/DualPipe).
    """
    p, m, schedule = config.mesh.pp, microbatches(config), config.pipeline.schedule
    stages = rank_stages(config, pp_rank)
    if p == 1:
        return {0: 1}
    if schedule == "GPipe":
        return dict.fromkeys(stages, m)
    if schedule == "1F1B":
        return {stages[0]: min(m, p - pp_rank)}
    if schedule in INTERLEAVED:
        per_round = m // max(1, m // p)
        after = p - 1 - pp_rank
        passes = (len(stages) - 1) * per_round + (2 * after if schedule == "Interleaved1F1B" else after + pp_rank) + 1
        turns = [i // per_round % len(stages) for i in range(min(passes, len(stages) * m))]
        return {stage: turns.count(i) for i, stage in enumerate(stages)}
    one_more = schedule == "DualPipeV"
    counts = (2 * p - pp_rank - 1 + one_more, pp_rank + 1)
    return {stage: min(m, count) for stage, count in zip(stages, counts, strict=True)}


def _gathered(config: Config, shards: list[ParameterShard]) -> int:
    """Elements of gathered weights that are alive at once."""
    if config.fsdp.reshard_after_forward == "never":
        return sum(shard.used_size for shard in shards if shard.row.fsdp)
    return sum(_root_sizes(shards)) + sum(sorted(_block_sizes(shards).values())[-2:])


def _block_sizes(shards: list[ParameterShard], local: bool = False) -> dict[int, int]:
    """Elements of each block that FSDP gathers, or a rank's part of them."""
    sizes: dict[int, int] = {}
    for shard in shards:
        if shard.name.startswith("layers.") and shard.row.fsdp:
            layer = int(shard.name.split(".")[1])
            sizes[layer] = sizes.get(layer, 0) + (shard.local_size if local else shard.used_size)
    return sizes


def _widened_blocks(config: Config, shards: list[ParameterShard]) -> set[int]:
    """Blocks whose gradients are widened to ``reduce_dtype`` before they are reduced: tp sums some of them first.
    Gradients that accumulate whole are wide already."""
    if accumulates(config):
        return set()
    summed = [shard.name for shard in shards if shard.row.fsdp and summed_over_tp(config, shard.row)]
    return {int(name.split(".")[1]) for name in summed if name.startswith("layers.")}


def _own_sizes(shards: list[ParameterShard]) -> dict[int, list[int]]:
    """Elements of each weight of experts outside of FSDP, by block."""
    sizes: dict[int, list[int]] = {}
    for shard in shards:
        if not shard.row.fsdp:
            sizes.setdefault(int(shard.name.split(".")[1]), []).append(shard.local_size)
    return sizes


def _root_sizes(shards: list[ParameterShard]) -> list[int]:
    """Elements of each parameter outside the blocks: FSDP's outermost group."""
    return [shard.used_size for shard in shards if not shard.name.startswith("layers.")]


def _stage_kept(config: Config, stage: int, skewed: bool) -> int:
    """Bytes that a stage keeps of one microbatch. A later stage's input lies in its receive buffer."""
    at, with_experts = tokens(config), moe_layers(config)
    stream = at.own * config.model.dim * at.compute
    blocks = sum(
        block_bytes(config, layer in with_experts, skewed, layer).kept for layer in stage_layers(config, stage)
    )
    last = stage == num_stages(config) - 1
    depth = config.model.mtp_depth
    head = head_bytes(config)[0] * (1 + depth) if last else 0
    # Each depth keeps the embedding of the tokens ahead, both norms' outputs joined, and the projection's.
    ahead = depth * stream * (4 if last else 1)
    return blocks + head + ahead + (stream if stage == 0 else 0)


def _receive_buffers(config: Config, alive: dict[int, int]) -> int:
    """torch.distributed.pipelining makes one for each microbatch of a step: inputs, and gradients of outputs."""
    at, last = tokens(config), num_stages(config) - 1
    ends = sum((stage > 0) + (stage < last) for stage in alive)
    return ends * microbatches(config) * at.own * stream_width(config) * at.compute


def _peers_rooms(config: Config) -> int:
    """Under ``mesh.dispatch = one_sided`` a rank's tokens where others read them, and room for what each rank sends."""
    if config.mesh.dispatch != "one_sided" or not moe_layers(config):
        return 0
    at = tokens(config)
    return (1 + expert_ranks(config)) * at.own * config.model.dim * at.compute


def _cast_bytes(config: Config) -> int:
    """Bytes of an element in ``training.dtype`` where that is not the dtype of the computation, else 0."""
    training = config.training
    return BYTES[training.dtype] if training.dtype != training.param_dtype else 0


def _moments(config: Config, shards: list[ParameterShard], alive: dict[int, int], skewed: bool) -> tuple[int, int, int]:
    """``(at_loss, at_block, at_reduce)`` of :class:`Memory`."""
    at, with_experts, last = tokens(config), moe_layers(config), num_stages(config) - 1
    reduce_bytes = BYTES[config.training.reduce_dtype]
    at_loss = waiting = head_gradient = 0
    if last in alive:
        head, logits = head_bytes(config)
        head_gradient = max(_root_sizes(shards), default=0) * at.compute
        # Only GPipe has run all forwards by then: their logits wait.
        waiting = (alive[last] - 1) * logits if config.pipeline.schedule == "GPipe" else 0
        at_loss = logits + waiting + head + head_gradient
    own, widened = _own_sizes(shards), _widened_blocks(config, shards)
    reduced = _block_sizes(shards, local=True)
    at_block = at_reduce = 0
    for layer, size in _block_sizes(shards).items():
        block = block_bytes(config, layer in with_experts, skewed, layer)
        # The head's gradient waits for the end of the backward pass, where its group is reduced.
        gradients = size * at.compute + head_gradient + waiting
        of_own = sum(own.get(layer, [])) * at.compute + max(own.get(layer, [0])) * _cast_bytes(config)
        of_lent = _lent_gradients(config) if layer in with_experts else 0
        at_block = max(at_block, block.backward + gradients + of_own + of_lent)
        flight = (size + reduced[layer]) * reduce_bytes
        flight += size * max(0, reduce_bytes - at.compute) if layer in widened else 0
        at_reduce = max(at_reduce, flight + gradients - block.kept)
    return at_loss, at_block, at_reduce


def _lent_gradients(config: Config) -> int:
    """Bytes of lent experts' gradients: of all of them as they are computed, and of the largest weight what all ranks
    send, what comes home, and where FSDP splits experts a rank's own in the same dtype."""
    lent, ranks = lent_experts(config), expert_ranks(config)
    if not lent:
        return 0
    each, wide = expert_weights(config), lent_gradient_bytes(config)
    fsdp = config.mesh.experts == "tp" or expert_shards(config) > 1
    summed = ranks * lent + lent + (config.moe.num_experts // ranks if fsdp else 0)
    return ranks * lent * sum(each) * tokens(config).compute + summed * max(each) * wide
