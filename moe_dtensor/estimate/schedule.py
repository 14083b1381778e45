"""What a pipeline schedule costs: idle time, and microbatches whose activations are alive. Loads no torch.

p are the pipeline ranks, v the stages on one rank, m the microbatches of a step.
"""

from __future__ import annotations

from moe_dtensor.config.resolve import INTERLEAVED, microbatches, rank_stages
from moe_dtensor.config.schema import Config

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

    Where the backward pass is split, forward, input gradients and weight gradients count as equally long. torch lays
    out ZBV for 2p-1 microbatches at least, and leaves the time of missing ones idle.
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


def in_flight(config: Config, pp_rank: int) -> dict[int, int]:
    """For each stage of a rank, the microbatches whose activations are alive when most are.

    Warm-up forwards as torch.distributed.pipelining lays them out, and one more: GPipe m; 1F1B one for each stage from
    here on; interleaved (v-1) rounds of p and twice (zero-bubble: once) the ranks after this one, there also the
    microbatches whose weight gradients wait; ZBV 2p stage passes, DualPipeV 2p+1 (github.com/deepseek-ai/DualPipe).
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
