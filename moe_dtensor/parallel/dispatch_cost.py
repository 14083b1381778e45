"""What a dispatch costs, by arithmetic. Loads no torch.

Bytes that one rank sends in a block's forward and backward pass of a microbatch over ``mesh.link_bandwidth``, plus what
each collective and each read of the device takes however little it moves. R ranks share the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Literal

from moe_dtensor.config.resolve import expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.model.activations import tokens

LATENCY = 20e-6
"""Seconds of a collective that moves next to nothing, over NVLink with NCCL."""
READ = 50e-6
"""Seconds that a GPU waits when the host reads a number from it."""


@dataclass(frozen=True)
class DispatchCost:
    """Of one block and microbatch, forward and backward."""

    sent: int
    """Bytes from one rank, copies balanced over the experts."""
    seconds: float


def dispatch_costs(config: Config) -> dict[Literal["all_gather", "all_to_all"], DispatchCost]:
    """The cost of each dispatch that ``mesh.experts`` allows; ``config`` is resolved."""
    costs = {"all_gather": _cost(config, _all_gather_bytes(config), collectives=7, reads=_reads_rows(config))}
    if config.mesh.experts != "tp_hidden":
        costs["all_to_all"] = _cost(config, _all_to_all_bytes(config), collectives=7, reads=1)
    return costs  # type: ignore[return-value]


def choose_dispatch(config: Config) -> Literal["all_gather", "all_to_all"]:
    """``mesh.dispatch``, or for ``auto`` the one that takes fewer seconds."""
    if config.mesh.dispatch != "auto":
        return config.mesh.dispatch
    costs = dispatch_costs(config)
    return min(costs, key=lambda name: costs[name].seconds)


def distinct_ranks(config: Config) -> float:
    """Expected number of ranks that hold one of a token's K experts, all choices alike likely."""
    moe, ranks = config.moe, expert_ranks(config)
    experts, chosen = moe.num_experts, min(moe.top_k, moe.num_experts)
    return ranks * (1 - comb(experts - experts // ranks, chosen) / comb(experts, chosen))


def _cost(config: Config, sent: float, collectives: int, reads: int) -> DispatchCost:
    return DispatchCost(round(sent), sent / (config.mesh.link_bandwidth * 1e9) + collectives * LATENCY + reads * READ)


def _reads_rows(config: Config) -> int:
    return 1 if config.moe.rows == "exact" and expert_ranks(config) > 1 else 0


def _row_bytes(config: Config) -> tuple[int, int, int]:
    """Bytes of a token's vector, of its gates, and of its ids."""
    at = tokens(config)
    return config.model.dim * at.compute, config.moe.top_k * at.wide, config.moe.top_k * 8


def _all_gather_bytes(config: Config) -> float:
    """Over each axis: vectors in and sums out, both ways; gates in, and their gradient back; ids once."""
    mesh, at = config.mesh, tokens(config)
    vector, gates, ids = _row_bytes(config)
    each, total, held = 4 * vector + 2 * gates + ids, 0.0, at.own
    if mesh.experts != "dp":
        if mesh.sequence_parallel:
            total += held * (mesh.tp - 1) * each
            held *= mesh.tp
        else:  # sums out and, backward, gradients of what came in: an all-reduce is two halves
            total += held * (mesh.tp - 1) / mesh.tp * (4 * vector + 2 * gates)
    if mesh.experts in ("dp", "dp_tp"):
        total += held * (mesh.dp - 1) * each
    return total


def _all_to_all_bytes(config: Config) -> float:
    """A row for each token and other rank that holds one of its experts: vectors both ways twice, gates and ids."""
    mesh, at, ranks = config.mesh, tokens(config), expert_ranks(config)
    vector, gates, _ = _row_bytes(config)
    repeated = mesh.tp > 1 and not mesh.sequence_parallel and mesh.experts != "dp"
    held = at.own / mesh.tp if repeated else at.own
    total = held * distinct_ranks(config) * (ranks - 1) / ranks * (4 * vector + 4 * gates)
    if repeated:  # results are gathered, and backward the gradients of shares
        total += held * (mesh.tp - 1) * (2 * vector + gates)
    return total
