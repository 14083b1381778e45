"""Routing and balancing as the oracle does them: token by token, with Python's own numbers where there is a choice.

Shares nothing with the library but the config. T tokens of a microbatch, D width, E experts, K choices (as many as the
longest choice under expert choice).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config

FORCED = ("hash", "uniform", "zipf")
Matrix = list[list[float]]
"""``(T, E)`` numbers that no gradient flows through."""


@dataclass(frozen=True)
class Place:
    """Where a microbatch's tokens stand: id and number in the run of each, tokens of each sequence and group."""

    layer: int
    ids: Sequence[int]
    numbers: Sequence[int]
    sequences: Sequence[range]
    groups: Sequence[range]


@dataclass
class Balance:
    """What balancing carries from step to step in one MoE block."""

    bias: Tensor
    """``(E,)``, float32 as in the library: a rate of 0.001 is not what it is in float64."""
    previous: list[int]
    """Copies sent to each expert in the step before, all 0 at first."""

    def after(self, rate: float, load: list[int]) -> Balance:
        """One step later: each bias has moved by ``rate`` toward the average load."""
        mean = Fraction(sum(load), len(load))
        move = [(count < mean) - (count > mean) for count in load]
        step = torch.tensor(rate, dtype=torch.float32)
        return Balance(torch.stack([b + step * m for b, m in zip(self.bias, move, strict=True)]), load)

    def churn(self, load: list[int]) -> float:
        """Share of copies that have to move to turn the last load into this one; 0 in the first step."""
        if sum(self.previous) == 0:
            return 0.0
        now, before = ([n / sum(counts) for n in counts] for counts in (load, self.previous))
        return sum(max(a - b, 0.0) for a, b in zip(now, before, strict=True))


@dataclass
class Routed:
    """What one MoE block decided for one microbatch."""

    chosen_TK: Tensor
    """Expert ids before any is dropped; -1 where a token has fewer than K."""
    kept_TK: Tensor
    """Which of them are computed."""
    gate_TK: Tensor
    """With gradient."""
    auxiliary: Tensor
    """Auxiliary losses times their coefficients, summed over tokens; with gradient."""
    sums: dict[str, float] = field(default_factory=dict)
    """The diagnostics, summed over tokens (``dropped``: copies)."""


def place(config: Config, layer: int, tokens_BS: Tensor, sequence_numbers: Sequence[int]) -> Place:
    """Number the tokens of a microbatch."""
    B, S = tokens_BS.shape
    size = config.moe.group_sequences
    return Place(
        layer,
        tokens_BS.flatten().tolist(),
        [number * S + s for number in sequence_numbers for s in range(S)],
        [range(b * S, (b + 1) * S) for b in range(B)],
        [range(b * S, min(b + size, B) * S) for b in range(0, B, size)],
    )


def random(key: int, stream: int) -> float:
    """Between 0 and 1: SplitMix64 (Steele, Lea and Flood, 2014) with 64-bit wrap-around written out."""
    z = (key + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return (2 * (z // 2**12) + 1) / 2**53


def jitter(config: Config, x_TD: Tensor, at: Place) -> Tensor:
    """What the router sees of the tokens in training."""
    amount, width = config.moe.jitter, x_TD.shape[1]
    stream = 2**40 + 1_000_003 * config.training.seed + at.layer
    noise = [[1 + amount * (2 * random(n * width + d, stream) - 1) for d in range(width)] for n in at.numbers]
    return x_TD * torch.tensor(noise, dtype=torch.float64)


def route(config: Config, logits_TE: Tensor, at: Place, balance: Balance, training: bool = True) -> Routed:
    """Choose, weight, drop and penalise. No gradient flows through the choice.

    In evaluation a token's choice must not depend on later ones: plain top-k unless the router is forced, dropless.
    """
    moe, K = config.moe, config.moe.top_k
    fixed_TE = logits_TE.detach()
    plain = [_best(row, K) for row in _limit(config, _plain(config, fixed_TE), balance)]
    sinkhorn_error = 0.0
    if not training and moe.router not in FORCED:
        chosen = plain
    elif moe.router == "expert_choice":
        chosen = _expert_choice(_scores(fixed_TE, moe.score).tolist(), at, K)
    elif moe.router == "sinkhorn":
        p_TE = torch.cat([sinkhorn(fixed_TE[list(group)], moe.sinkhorn_iterations) for group in at.groups])
        sinkhorn_error = float((p_TE.sum(1) - 1).abs().sum())
        rows = (p_TE if moe.score_before_top_k else p_TE.log()).tolist()
        chosen = [_best(row, K) for row in _limit(config, rows, balance)]
    elif moe.router in FORCED:
        chosen = [_best(_gumbel(config, at, t), K) for t in range(len(at.ids))]
    elif moe.router == "topk":
        chosen = plain
    else:
        raise ValueError(f"The oracle does not know moe.router = {moe.router!r}.")
    chosen_TK = torch.tensor([row + [-1] * (max(map(len, chosen)) - len(row)) for row in chosen])
    gate_TK = _gates(config, logits_TE, chosen_TK)
    limited = moe.capacity_factor and training
    kept_TK = _within_capacity(config, gate_TK.tolist(), chosen, at) if limited else chosen_TK >= 0
    even_loss = torch.zeros((), dtype=torch.float64)
    if moe.balance_loss:
        even_loss = _balance_loss(config, logits_TE, chosen, at, balance)
    z_T = logits_TE.exp().sum(1).log() ** 2
    sums = _shape_of_scores(fixed_TE) | {
        "router_gate_norm": float((gate_TK.detach() ** 2).sum(1).sqrt().sum()),
        "router_z": float(z_T.detach().sum()),
        "balance_loss": float(even_loss.detach()),
        "dropped": float((chosen_TK >= 0).sum() - kept_TK.sum()),
        "differs_from_top_k": float(
            sum(set(a) != set(b) for a, b in zip(chosen, plain, strict=True)) if moe.router not in FORCED else 0
        ),
        "sinkhorn_error": sinkhorn_error,
    }
    auxiliary = moe.balance_loss * even_loss + moe.z_loss * z_T.sum()
    return Routed(chosen_TK, kept_TK, gate_TK, auxiliary, sums)


def sinkhorn(logits_TE: Tensor, iterations: int) -> Tensor:
    """Rows scaled to sum 1, then columns to sum T/E, ``iterations`` times over (Sinkhorn and Knopp, 1967)."""
    p_TE = (logits_TE - logits_TE.max()).exp()
    tokens, experts = p_TE.shape
    for _ in range(iterations):
        p_TE = p_TE / p_TE.sum(1, keepdim=True)
        p_TE = p_TE / p_TE.sum(0, keepdim=True) * (tokens / experts)
    return p_TE


def histogram(chosen: Sequence[Sequence[int]], experts: int) -> list[int]:
    """Copies by expert."""
    counts = Counter(e for row in chosen for e in row)
    return [counts[e] for e in range(experts)]


def _scores(logits_TE: Tensor, name: str) -> Tensor:
    if name == "sigmoid":
        return 1 / (1 + (-logits_TE).exp())
    exp_TE = (logits_TE - logits_TE.detach().amax(1, keepdim=True)).exp()
    return exp_TE / exp_TE.sum(1, keepdim=True)


def _best(row: Sequence[float], K: int) -> list[int]:
    """The K highest, of equal ones the lower id."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:K]


def _plain(config: Config, fixed_TE: Tensor) -> Matrix:
    """What plain top-k goes by: scores, or logits, which are in the same order unless something is added to them."""
    return (_scores(fixed_TE, config.moe.score) if config.moe.score_before_top_k else fixed_TE).tolist()


def _limit(config: Config, rows: Matrix, balance: Balance) -> Matrix:
    """Add the bias, then hide the experts outside the best groups of experts."""
    moe, bias = config.moe, balance.bias.double().tolist()
    if moe.selection_bias:
        rows = [[value + b for value, b in zip(row, bias, strict=True)] for row in rows]
    if not moe.expert_groups:
        return rows
    size = moe.num_experts // moe.expert_groups
    limited = []
    for row in rows:
        counted = 2 if moe.group_score == "top2" else 1
        of_groups = [sum(sorted(row[g * size : (g + 1) * size])[-counted:]) for g in range(moe.expert_groups)]
        stay = _best(of_groups, moe.expert_groups_kept)
        limited.append([value if e // size in stay else -math.inf for e, value in enumerate(row)])
    return limited


def _gumbel(config: Config, at: Place, t: int) -> list[float]:
    """A forced router's ranking of one token."""
    router, experts = config.moe.router, config.moe.num_experts
    key = at.ids[t] if router == "hash" else at.numbers[t]
    stream = at.layer + (0 if router == "hash" else 1_000_003 * (config.training.seed + 1))
    weight = [1 / (e + 1) if router == "zipf" else 1.0 for e in range(experts)]
    return [math.log(weight[e]) - math.log(-math.log(random(key * experts + e, stream))) for e in range(experts)]


def _expert_choice(score: Matrix, at: Place, K: int) -> list[list[int]]:
    """The experts that take each token, those that score higher first."""
    experts = len(score[0])
    takers: list[list[int]] = [[] for _ in score]
    for group in at.groups:
        takes = min(len(group), math.ceil(Fraction(len(group) * K, experts)))
        for e in range(experts):
            # Equal up to rounding is equal: the earlier token is taken.
            for t in sorted(group, key=lambda t: (-round(score[t][e], 11), t))[:takes]:
                takers[t].append(e)
    return [sorted(row, key=lambda e: (-score[t][e], e)) for t, row in enumerate(takers)]


def _gates(config: Config, logits_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    moe, taken_TK = config.moe, chosen_TK >= 0
    ids_TK = chosen_TK.clamp(min=0)
    if moe.score == "softmax" and not moe.score_before_top_k:
        gate_TK = _scores(logits_TE.gather(1, ids_TK), "softmax")
    else:
        gate_TK = _scores(logits_TE, moe.score).gather(1, ids_TK)
    if moe.normalize_gates:
        gate_TK = gate_TK / gate_TK.sum(1, keepdim=True)
    return moe.gate_scale * gate_TK * taken_TK


def _within_capacity(config: Config, gate: Matrix, chosen: list[list[int]], at: Place) -> Tensor:
    moe = config.moe
    kept_TK = torch.zeros(len(chosen), moe.top_k, dtype=torch.bool)
    for group in at.groups:
        # A factor is meant as it is written: 1.1 is eleven tenths.
        most = math.ceil(Fraction(str(moe.capacity_factor)) * len(group) * moe.top_k / moe.num_experts)
        copies = [(t, k) for t in group for k in range(moe.top_k)]
        if moe.drop_by == "position":
            copies.sort(key=lambda copy: (copy[1], copy[0]))
        else:
            copies.sort(key=lambda copy: (-round(gate[copy[0]][copy[1]], 11), copy))
        taken: Counter[int] = Counter()
        for t, k in copies:
            if taken[chosen[t][k]] < most:
                taken[chosen[t][k]] += 1
                kept_TK[t, k] = True
    return kept_TK


def _balance_loss(config: Config, logits_TE: Tensor, chosen: list[list[int]], at: Place, balance: Balance) -> Tensor:
    """``E * sum_e f_e P_te`` summed over tokens, f the shares in the set that token t belongs to."""
    moe, experts = config.moe, config.moe.num_experts
    p_TE = _scores(logits_TE, moe.score)
    p_TE = p_TE / p_TE.sum(1, keepdim=True)
    loss = torch.zeros((), dtype=torch.float64)
    for tokens in {"sequence": at.sequences, "group": at.groups, "batch": [range(len(chosen))]}[moe.balance_over]:
        counts = histogram([chosen[t] for t in tokens], experts)
        if moe.balance_over == "batch":
            counts = balance.previous if sum(balance.previous) else [1] * experts
        for e in range(experts):
            loss = loss + experts * counts[e] / sum(counts) * p_TE[list(tokens), e].sum()
    return loss


def _shape_of_scores(fixed_TE: Tensor) -> dict[str, float]:
    p_TE = _scores(fixed_TE, "softmax")
    best = [sorted(row, reverse=True) for row in p_TE.tolist()]
    return {
        "router_entropy": float(-torch.xlogy(p_TE, p_TE).sum()),
        "router_margin": sum(row[0] - sum(row[1:2]) for row in best),
    }
