"""What a dispatch sends and what that costs, by arithmetic. Loads no torch.

Each collective of :mod:`moe_dtensor.parallel.dispatch`, forward and backward, with the bytes that one rank sends in it
(``tests/estimate/test_plan_measured.py`` counts the same in real steps). Seconds are those bytes over
``mesh.link_bandwidth``, plus what each collective and each read of the device takes however little it moves; nothing is
taken to overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from moe_dtensor.config.resolve import expert_dp_ranks, expert_ranks, lent_experts
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.sizes import (
    columns,
    distinct_ranks,
    expert_weights,
    lent_gradient_bytes,
    reads_device,
    repeats_tokens,
    sent_tokens,
    tokens,
)

LATENCY = 20e-6
"""Seconds of a collective that moves next to nothing, over NVLink with NCCL."""
READ = 50e-6
"""Seconds that a GPU waits when the host reads a number from it."""

Axis = Literal["dp", "tp", "dp_tp"]
Name = Literal["all_gather", "all_to_all", "one_sided"]


class Move(NamedTuple):
    """A tensor's way over an axis and its gradient's way back: bytes that one rank sends, 0 where nothing travels."""

    axis: Axis
    forward: float
    backward: float
    kept: bool = False
    """Whether selective recomputation keeps what the forward brings, or only needs it for what it keeps: sums over
    ranks; compiled, also all that ends in a choice, a route or a count."""


class Saved(NamedTuple):
    """A place in the forward pass where something is saved for the backward pass: recomputation goes on to the last."""


Steps = list[Move | Saved]


@dataclass(frozen=True)
class DispatchCost:
    """Of one block and microbatch: forward, recomputed, and backward."""

    sent: dict[Axis, int]
    """Bytes from one rank by axis, copies balanced over the experts."""
    collectives: int
    reads: int
    """Times that the host waits for a number from the device."""
    moving: float
    """Seconds for the bytes."""
    waiting: float
    """Seconds for collectives and reads, however little they move."""

    @property
    def total(self) -> int:
        """Bytes over all axes."""
        return sum(self.sent.values())

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.moving + self.waiting


def settle(config: Config) -> Config:
    """The config with ``mesh.dispatch`` as it will run: not ``auto``, and no all-to-all where one rank has all."""
    return replace(config, mesh=replace(config.mesh, dispatch=choose_dispatch(config)))


def choose_dispatch(config: Config) -> Name:
    """``mesh.dispatch``, or for ``auto`` the one that takes fewer seconds; ``config`` is resolved."""
    if config.moe.num_experts == 0 or expert_ranks(config) == 1:
        return "all_gather"
    if config.mesh.dispatch != "auto":
        return config.mesh.dispatch
    return cheaper(dispatch_costs(config))


def cheaper(costs: Mapping[Name, DispatchCost]) -> Name:
    """The one that takes fewer seconds, of those for any GPUs; all-gather if they are alike."""
    return min((name for name in costs if name != "one_sided"), key=lambda name: costs[name].seconds)


def dispatch_costs(config: Config) -> dict[Name, DispatchCost]:
    """The cost of each dispatch that ``mesh.experts`` and ``mesh.lent_experts`` allow, of ``one_sided`` where it is
    named; ``config`` is resolved."""
    either = expert_ranks(config) > 1 and not lent_experts(config)
    names: tuple[Name, ...] = ("all_gather", "all_to_all") if either else ("all_gather",)
    names = (*names, "one_sided") if config.mesh.dispatch == "one_sided" else names
    return {name: _cost(replace(config, mesh=replace(config.mesh, dispatch=name))) for name in names}


def _cost(config: Config) -> DispatchCost:
    steps = dispatch_steps(config)
    moves = passes(config, steps)
    sent: dict[Axis, float] = {}
    for axis, size in moves:
        sent[axis] = sent.get(axis, 0) + size
    reads = reads_device(config) * (1 if config.activation_checkpoint.mode == "none" else 2)
    moving = sum(sent.values()) / (config.mesh.link_bandwidth * 1e9)
    waiting = len(moves) * LATENCY + reads * READ
    return DispatchCost({axis: round(size) for axis, size in sent.items()}, len(moves), reads, moving, waiting)


def passes(config: Config, steps: Sequence[Move | Saved]) -> list[tuple[Axis, float]]:
    """All collectives of some steps, as (axis, bytes): forward, again under recomputation, and backward."""
    mode = config.activation_checkpoint.mode
    moves = [step for step in steps if isinstance(step, Move)]
    runs = [(move.axis, move.forward) for move in moves]
    runs += [(move.axis, move.backward) for move in moves]
    if mode != "none":
        last = max((i for i, step in enumerate(steps) if isinstance(step, Saved)), default=0)
        again = [step for step in steps[:last] if isinstance(step, Move)]
        runs += [(move.axis, move.forward) for move in again if not (move.kept and mode == "selective")]
    return [(axis, sent) for axis, sent in runs if sent > 0]


def dispatch_steps(config: Config) -> Steps:
    """What happens between router and sum in one block and microbatch, in order, shared expert included.

    ``config`` is resolved and ``mesh.dispatch`` settled; built as :func:`moe_dtensor.parallel.dispatch.build_dispatch`
    builds the dispatch.
    """
    # Biases of the experts' outputs come after the sum, and are the last to save something.
    return [*_steps(config), Saved()] if config.moe.expert_bias else _steps(config)


def _steps(config: Config) -> Steps:
    mesh, whole = config.mesh, tokens(config).whole
    if mesh.dispatch == "all_to_all":
        return [*_shares(config), *_shared(config)] if repeats_tokens(config) else _all_to_all(config, _shared(config))
    if mesh.dispatch == "one_sided":
        axis: Literal["dp", "tp"] = "dp" if mesh.experts == "dp" else "tp"
        return [*_all_gather(config, axis, tokens(config).own, [Saved()]), *_shared(config)]
    if mesh.experts == "dp":
        return [*_all_gather(config, "dp", tokens(config).own, [*_lent(config), Saved()]), *_shared(config)]
    inner: Steps = [*_lent(config), Saved()]
    if mesh.experts == "dp_tp":
        inner = _all_gather(config, "dp", whole, inner)
        inner += [Saved()] if config.moe.shared_hidden_dim else []
    return _all_gather(config, "tp", tokens(config).own, inner) if mesh.sequence_parallel else _reduce(config, inner)


def border_steps(config: Config, inner: Steps) -> Steps:
    """Into a layer that tp splits and out of it."""
    whole = tokens(config).whole * _bytes_of_token(config)[0]
    once = whole * (config.mesh.tp - 1) / config.mesh.tp
    if config.mesh.sequence_parallel:
        return [Move("tp", once, once), *inner, Move("tp", once, once, kept=True)]
    return [Move("tp", 0, 2 * once), *inner, Move("tp", 2 * once, 0, kept=True)]


def _bytes_of_token(config: Config) -> tuple[int, int, int]:
    """Of its vector, of its gates, and of its ids."""
    at = tokens(config)
    return config.model.dim * at.compute, columns(config) * at.wide, columns(config) * 8


def _all_gather(config: Config, axis: Literal["dp", "tp"], held: int, inner: Steps) -> Steps:
    """Vectors, gates and ids of ``held`` tokens to each other rank of the axis, and sums back."""
    others = (expert_dp_ranks(config) if axis == "dp" else config.mesh.tp) - 1
    vector, gates, ids = (held * others * size for size in _bytes_of_token(config))
    # One-sided, the gather is an operator of ours, which selective recomputation keeps.
    enter: Steps = [
        Move(axis, vector, vector, kept=config.mesh.dispatch == "one_sided"),
        Move(axis, gates, gates),
        Move(axis, ids, 0, config.compile.enable),
    ]
    return [*enter, *inner, Move(axis, vector, vector, kept=True)]


def _lent(config: Config) -> Steps:
    """Weights of lent experts to all ranks that share experts, their gradients home."""
    others = lent_experts(config) * (expert_ranks(config) - 1)
    each = [others * weight for weight in expert_weights(config)] if others else []
    there, back = tokens(config).compute, lent_gradient_bytes(config)
    return [Move(_shared_axis(config), size * there, size * back) for size in each]


def _reduce(config: Config, inner: Steps) -> Steps:
    """Every tp rank holds all tokens: nothing in, sums out; gradients of vectors and gates are all-reduced."""
    whole, tp = tokens(config).whole, config.mesh.tp
    vector, gates, _ = (2 * whole * (tp - 1) / tp * size for size in _bytes_of_token(config))
    return [Move("tp", 0, vector), Move("tp", 0, gates), *inner, Move("tp", vector, 0, kept=True)]


def _all_to_all(config: Config, meanwhile: Steps) -> Steps:
    """Counts, then gates with ids in their dtype, then vectors to each rank that holds one of a token's experts; sums
    come back. Of the rows, the share for a rank itself stays. ``meanwhile``: while they travel there."""
    ranks = expert_ranks(config)
    rows = sent_tokens(config) * distinct_ranks(config) * (ranks - 1) / ranks
    vector, gates, _ = (rows * size for size in _bytes_of_token(config))
    axis, compiled = _shared_axis(config), config.compile.enable
    counts = Move(axis, 16 * (ranks - 1), 0, compiled)
    there: Steps = [counts, Move(axis, 2 * gates, 2 * gates), Move(axis, vector, vector)]
    # Where the rows of a token lie is saved again for their sum, after they are back: eagerly they come back again.
    return [*there, *meanwhile, Saved(), Move(axis, vector, vector, compiled), Saved()]


def _shared_axis(config: Config) -> Axis:
    """The axis of ranks that share whole experts; of two, one that has all ranks counts by its own name."""
    mesh = config.mesh
    if mesh.experts == "dp_tp":
        return "dp" if mesh.tp == 1 else "tp" if expert_dp_ranks(config) == 1 else "dp_tp"
    return "dp" if mesh.experts == "dp" else "tp"


def _shares(config: Config) -> Steps:
    """tp ranks hold the same tokens: each sends its share of them, and the results are gathered."""
    others = sent_tokens(config) * (config.mesh.tp - 1)
    vector, gates, _ = (others * size for size in _bytes_of_token(config))
    return [Move("tp", 0, vector), Move("tp", 0, gates), *_all_to_all(config, []), Move("tp", vector, 0)]


def _shared(config: Config) -> Steps:
    """A shared expert that works apart from the dispatch, with borders over tp of its own."""
    return border_steps(config, [Saved()]) if config.moe.shared_hidden_dim else []
