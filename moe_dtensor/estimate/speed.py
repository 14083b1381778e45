"""How long a step would take, by arithmetic from a few measured speeds. Loads no torch.

A sum of what a rank computes, of what it sends and nothing hides, of what each collective takes however small it is,
and of the optimizer, over one minus the pipeline's bubble. It ranks meshes; it does not replace ``bench train``.
``plan --search`` prints how far it is from what was measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal

from moe_dtensor.config.resolve import (
    GATED,
    attends_by_sequence,
    block_config,
    expert_dp_ranks,
    expert_ranks,
    expert_shards,
    lent_experts,
    microbatches,
    moe_layers,
    rank_stages,
    shard_ranks,
    stage_layers,
)
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import LATENCY, READ, dispatch_costs
from moe_dtensor.estimate.shards import flops_per_token, gathered_by_attention, stage_shards
from moe_dtensor.estimate.sizes import BYTES
from moe_dtensor.estimate.traffic import activation_bytes, fsdp_bytes, pp_bytes, replicated_gradient_bytes

Routing = Literal["balanced", "learned", "skewed"]
ROUTINGS: tuple[Routing, ...] = ("balanced", "learned", "skewed")
BUSIEST = {"balanced": 1.3, "free": 2.6}
"""Load of the busiest expert over the mean, as learned: with something that balances (sinkhorn, a loss, a bias), and
with nothing (``docs/study.md``)."""
HIDDEN = 0.5
"""Share of the tokens' way that compiled blocks hide: 45 to 59 % on two H100 (``docs/several_gpus.md``)."""
MEMORY_BANDWIDTH = 3.0e12
"""Bytes a second that AdamW reads and writes at, on a Hopper card."""


THIN = 100.0
"""Products of experts F hidden units wide take 1 + THIN / F times as long as very wide ones: on two H100 half of 512
cost 8 % of a step (``docs/several_gpus.md``)."""
FLOAT8 = 1.2
"""Experts with products in float8 are so many times as fast: 1.15 to 1.24 on an H200 (``docs/speed.md``)."""


@dataclass(frozen=True)
class Speeds:
    """What the machines do."""

    flops: float = 380e12
    """FLOP/s that a device makes of a training step's products: at olmoe_small 340e12 were measured on an H100, before
    kernels grew faster, and 414e12 on an H200 since."""
    inside: float = 450e9
    """Bytes/s that a rank sends to others in its host."""
    between: float = 50e9
    """Bytes/s that a rank sends to other hosts: 400 Gbit/s a device."""
    host: int = 8
    """Devices in a host."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that takes longest."""

    computing: float
    """Products, recomputation and uneven stages included."""
    uneven: float
    """What the busiest rank's experts take longer than the average's."""
    weights: float
    """FSDP's gathers and reductions, as far as computing does not hide them."""
    tokens: float
    """Tokens on their way to experts and over tp, as far as nothing hides them."""
    stages: float
    """Between pipeline stages."""
    waiting: float
    """Collectives however small, and reads of the device."""
    updating: float
    """The optimizer."""
    bubble: float
    """Idle in the pipeline."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())


@functools.lru_cache(maxsize=65536)
def step_time(config: Config, speeds: Speeds, routing: Routing) -> StepTime:
    """Of a resolved config that knows its vocabulary, ``mesh.dispatch`` and ``fsdp.accumulate`` settled."""
    training, mesh = config.training, config.mesh
    dense, experts = _flops(config)
    tokens = training.global_batch_size * training.seq_len
    each = tokens / (mesh.dp * mesh.pp * mesh.tp) / speeds.flops * _fullest_stage(config)
    computing, on_experts = each * (dense + experts), each * experts
    more = busiest_rank(config, routing) - 1
    tp, inner, sharded, pipeline = _links(config, speeds)
    within = [activation_bytes(config, rank_stages(config, rank)) for rank in range(mesh.pp)]
    summed = max(replicated_gradient_bytes(config, rank_stages(config, rank)) for rank in range(mesh.pp))
    over_tp = max(sent["tp"] for sent in within) / tp + summed / tp
    to_experts = max(sent["dp"] + sent["dp_tp"] for sent in within) / inner * (1 + more)
    hidden = HIDDEN if config.compile.enable else 0.0
    fsdp = max(fsdp_bytes(config, rank_stages(config, rank)) for rank in range(mesh.pp)) / sharded
    busy = computing + on_experts * more
    through = max(pp_bytes(config, rank_stages(config, rank)) for rank in range(mesh.pp)) / pipeline
    stored = max(_stored(config, rank) for rank in range(mesh.pp))
    waiting = _waiting(config)
    in_pipeline = busy + (over_tp + to_experts) * (1 - hidden) + through + waiting
    idle = bubble(config)
    return StepTime(
        computing=computing,
        uneven=on_experts * more,
        weights=max(0.0, fsdp - busy),
        tokens=(over_tp + to_experts) * (1 - hidden),
        stages=through,
        waiting=waiting,
        # Weight, gradient and two moments: four reads, three writes.
        updating=7 * stored * BYTES[training.dtype] / MEMORY_BANDWIDTH,
        bubble=in_pipeline * idle / (1 - idle),
    )


def tokens_per_second(config: Config, time: StepTime) -> float:
    """Of all ranks together."""
    return config.training.global_batch_size * config.training.seq_len / time.total


def busiest_rank(config: Config, routing: Routing) -> float:
    """Load of the busiest rank's experts over the average's, in a block.

    Learned: experts' loads spread around the mean so that the busiest of E has :data:`BUSIEST`; a rank's load is the
    mean of its experts'. Skewed: an expert's popularity falls as 1 over its number, and the first rank has the first.
    It keeps the copies of experts that it does not lend, and no fewer than the mean.
    """
    moe, ranks = config.moe, expert_ranks(config)
    if not moe_layers(config) or ranks == 1 or routing == "balanced":
        return 1.0
    held, lent = moe.num_experts // ranks, lent_experts(config)
    if routing == "learned":
        balanced = moe.router != "topk" or moe.balance_loss > 0 or moe.bias_rate > 0
        most = BUSIEST["balanced" if balanced else "free"] - 1
        load = 1 + most * sqrt(ranks / moe.num_experts * log(ranks) / log(max(2, moe.num_experts)))
        # The busiest experts of a rank have at least their share of its copies.
        return max(1.0, load * (1 - lent / held))
    chosen = _zipf(moe.num_experts, moe.top_k)
    kept = sum(chosen[lent:held]) / moe.top_k * ranks
    return max(1.0, kept)


def _zipf(experts: int, top_k: int) -> list[float]:
    """How often a token chooses each expert, K different ones: ``1 - exp(-c / i)``, with c so that they sum to K."""
    if top_k >= experts:
        return [1.0] * experts
    low, high = 0.0, 1.0
    while sum(1 - exp(-high / i) for i in range(1, experts + 1)) < top_k:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if sum(1 - exp(-middle / i) for i in range(1, experts + 1)) < top_k:
            low = middle
        else:
            high = middle
    return [1 - exp(-high / i) for i in range(1, experts + 1)]


def _flops(config: Config) -> tuple[float, float]:
    """Of one token, recomputation included: outside of the experts, and in them, where thin products count as more."""
    model, moe = config.model, config.moe
    weights = (2 + (model.activation in GATED)) * moe.hidden_dim * model.dim if moe.num_experts else 0
    experts = 6.0 * weights * sum(block_config(config, layer).moe.top_k for layer in moe_layers(config))
    dense = flops_per_token(config) - experts
    hidden = moe.hidden_dim / (config.mesh.tp if config.mesh.experts == "tp_hidden" else 1)
    experts *= (1 + THIN / hidden) / (1 + THIN / 512) / (FLOAT8 if moe.expert_dtype == "float8" else 1.0)
    # A forward is a third of both passes. Selective recomputation keeps what experts and attention gave.
    again = {"none": (0.0, 0.0), "selective": (1 / 3, 0.0), "full": (1 / 3, 1 / 3)}[config.activation_checkpoint.mode]
    return dense * (1 + again[0]), experts * (1 + again[1])


def _fullest_stage(config: Config) -> float:
    """Blocks of the pipeline rank that has most, over the average."""
    pp = config.mesh.pp
    counts = [sum(len(stage_layers(config, stage)) for stage in rank_stages(config, rank)) for rank in range(pp)]
    return max(counts) * pp / sum(counts)


def _links(config: Config, speeds: Speeds) -> tuple[float, float, float, float]:
    """Bytes/s of tp, of ranks that share experts, of FSDP, of pipeline neighbours: tp is innermost, dp outermost."""
    mesh = config.mesh
    block = mesh.pp * mesh.tp

    def speed(span: int) -> float:
        return speeds.inside if span <= speeds.host else speeds.between

    sharing = mesh.tp if mesh.experts in ("tp", "tp_hidden") else expert_dp_ranks(config) * block
    sharded = shard_ranks(config) if expert_shards(config) == 1 else mesh.dp
    return speed(mesh.tp), speed(sharing), speed(sharded * block), speed(block)


def _stored(config: Config, pp_rank: int) -> int:
    """Elements that a rank updates."""
    return sum(s.local_size for stage in rank_stages(config, pp_rank) for s in stage_shards(config, stage))


def _waiting(config: Config) -> float:
    """Seconds of a step's collectives and reads, however little they move, on the rank with most blocks."""
    mesh, blocks = config.mesh, config.model.num_layers / config.mesh.pp
    borders = 4 if mesh.tp > 1 else 0
    if attends_by_sequence(config):
        borders = 2 * len(gathered_by_attention(config))
    each = blocks * borders * LATENCY
    if moe_layers(config) and expert_ranks(config) > 1:
        each += len(moe_layers(config)) / mesh.pp * dispatch_costs(config)[mesh.dispatch].waiting  # type: ignore[index]
    once = (2 if config.fsdp.reshard_after_forward == "always" else 0) * blocks if mesh.dp > 1 else 0
    return microbatches(config) * (each + once * LATENCY) + READ


SOURCES = {
    "GPipe": "(p-1)/(m+p-1) (arXiv:1811.06965)",
    "1F1B": "(p-1)/(m+p-1) (arXiv:2104.04473)",
    "Interleaved1F1B": "(p-1)/(vm+p-1) (arXiv:2104.04473)",
    "InterleavedZeroBubble": "(p-1)/(3vm+p-1): ZB1P's (p-1)(F+B-2W) with B = 2F = 2W (arXiv:2401.10241)",
    "ZBVZeroBubble": "0 if forward and both halves of backward take equal time and m >= 2p-1 (arXiv:2401.10241)",
    "DualPipeV": "(p-1)/(3m+p-1): (p-1)(F&B+B-3W) with B = 2F = 2W, no overlap (github.com/deepseek-ai/DualPipe)",
}
"""Where each formula of :func:`bubble` is from. F, B, W: times of a stage's forward, backward, weight gradients."""


def bubble(config: Config) -> float:
    """Share of a step's time that a pipeline rank waits, by the published formula; stages alike, sends free.

    p are the pipeline ranks, v the stages on one rank, m the microbatches of a step. Where the backward pass is split,
    forward, input gradients and weight gradients count as equally long. torch lays out ZBV for 2p-1 microbatches at
    least, and leaves the time of missing ones idle.
    """
    p, m, v = config.mesh.pp, microbatches(config), config.pipeline.stages_per_rank
    if p == 1:
        return 0.0
    match config.pipeline.schedule:
        case "Interleaved1F1B":
            return (p - 1) / (v * m + p - 1)
        case "InterleavedZeroBubble":
            return (p - 1) / (3 * v * m + p - 1)
        case "ZBVZeroBubble":
            return max(0.0, 1 - m / (2 * p - 1))
        case "DualPipeV":
            return (p - 1) / (3 * m + p - 1)
    return (p - 1) / (m + p - 1)
