"""A dense model becomes a mixture of experts (sparse upcycling, arXiv:2212.05055).

Each feed-forward is cut into m parts (a granular split), and the experts are copies of those parts. Expert e is part
``e % m`` of copy ``e // m``, and the m experts of a copy start with one and the same router row: a token that chooses
a copy chooses all its parts (virtual groups, arXiv:2410.07524). With gates that sum to 1, times m, the mixture is then
the dense model, exactly. Noise and re-initialised hidden units (drop-upcycling, arXiv:2502.19261) give that up for
experts that differ.

D width, H hidden width of the dense feed-forward, F = H / m, E experts, G 2 if gated else 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import GATED, moe_layers
from moe_dtensor.config.schema import Config

Read = Callable[[str], Tensor]
"""A whole parameter by its name."""
_DENSE = re.compile(r"layers\.(\d+)\.feed_forward\.(gate|up|down)\.weight")


@dataclass(frozen=True)
class Upcycling:
    """How a dense model is made into a mixture."""

    num_experts: int
    """E, a multiple of ``split``."""
    top_k: int = 2
    """Experts a token is sent to; a multiple of ``split`` keeps the function."""
    split: int = 1
    """Parts m that each feed-forward is cut into; divides its hidden width."""
    noise: float = 0.0
    """Standard deviation of what is added to weights, as a share of their own."""
    noise_share: float = 1.0
    """Share of the copies that get the noise; the first ones stay as they are."""
    reinit: float = 0.0
    """Share of each expert's hidden units that are drawn anew."""
    router_std: float = 0.02
    """Standard deviation of the router's rows."""
    normalize: bool = True
    """Gates that sum to 1. Else those of a softmax over all experts, scaled to sum to 1 where all score alike."""
    layers: tuple[int, ...] = ()
    """Blocks to change. Empty: all."""
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether the mixture is the dense model."""
        return self.normalize and self.top_k % self.split == 0 and not self.noise and not self.reinit


def _rules(parent: Config, how: Upcycling) -> tuple[tuple[bool, str, str], ...]:
    """Whether each is broken, the rule with its values, and the remedy."""
    hidden, blocks = parent.model.hidden_dim, parent.model.num_layers
    return (
        (
            parent.moe.num_experts > 0,
            f"--upcycle wants a dense model; this one has moe.num_experts = {parent.moe.num_experts}.",
            "Give experts to a mixture with --add-experts.",
        ),
        (
            parent.model.ffn_bias,
            "--upcycle cannot make experts of a feed-forward with biases (model.ffn_bias = true).",
            "Upcycle a model without them.",
        ),
        (
            how.split < 1 or hidden % max(1, how.split) > 0,
            f"--upcycle-split {how.split} does not divide model.hidden_dim = {hidden}.",
            f"Give a divisor of {hidden}.",
        ),
        (
            how.num_experts % max(1, how.split) > 0 or how.num_experts < 2,
            f"--upcycle {how.num_experts} is not a multiple of --upcycle-split {how.split}, or below 2.",
            "Give whole copies: a multiple of the split.",
        ),
        (
            not 0 < how.top_k <= how.num_experts,
            f"--upcycle-top-k {how.top_k} is no number from 1 to --upcycle {how.num_experts}.",
            "Give a number of experts that there are.",
        ),
        (
            how.top_k == 1 and how.normalize,
            "--upcycle-top-k 1 with gates that sum to 1: the one gate is always 1, and the router learns nothing.",
            "Give 2 or more, or --upcycle-gates softmax.",
        ),
        (
            any(not 0 <= i < blocks for i in how.layers),
            f"--upcycle-layers {list(how.layers)}: there are blocks 0 to {blocks - 1}.",
            "Name blocks that there are.",
        ),
        (
            not (0 <= how.reinit <= 1 and 0 <= how.noise_share <= 1 and how.noise >= 0),
            "--upcycle-reinit and --upcycle-noise-share are shares from 0 to 1, --upcycle-noise is 0 or more.",
            "Give such numbers.",
        ),
    )


def upcycled_config(parent: Config, how: Upcycling) -> Config:
    """The config of the mixture.

    Args:
        parent: resolved, dense.

    Raises:
        ConfigError: the parent is no dense model, or its sizes do not go with ``how``.
    """
    for wrong, rule, remedy in _rules(parent, how):
        if wrong:
            raise ConfigError(rule, remedy)
    hidden, blocks = parent.model.hidden_dim, parent.model.num_layers
    scale = float(how.split) if how.normalize else how.split * how.num_experts / how.top_k
    moe = replace(
        parent.moe,
        num_experts=how.num_experts,
        top_k=how.top_k,
        hidden_dim=hidden // how.split,
        every=1,
        layers=() if len(set(how.layers)) in (0, blocks) else tuple(sorted(set(how.layers))),
        top_k_by_layer=(),
        router="topk",
        router_by_layer=(),
        score="softmax",
        score_before_top_k=True,
        normalize_gates=how.normalize,
        gate_scale=scale,
    )
    return replace(parent, moe=moe)


def upcycled_shapes(
    parent: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Shape of every parameter of the mixture, and the dense parameter whose dtype it takes.

    Args:
        parent: shapes by name.
        config: of the mixture.
    """
    moe, dim = config.moe, config.model.dim
    gates = 2 if config.model.activation in GATED else 1
    shapes: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for name, shape in parent.items():
        match = _DENSE.fullmatch(name)
        if match is None or int(match[1]) not in moe_layers(config):
            shapes[name] = shape, name
        elif match[2] == "down":
            block = f"layers.{match[1]}.moe."
            shapes[block + "router.weight"] = (moe.num_experts, dim), name
            shapes[block + "experts.w_up"] = (moe.num_experts, gates, moe.hidden_dim, dim), name
            shapes[block + "experts.w_down"] = (moe.num_experts, dim, moe.hidden_dim), name
    return shapes


def upcycled(name: str, read: Read, config: Config, how: Upcycling) -> Tensor:
    """One whole parameter of the mixture.

    Args:
        name: of the mixture's parameter.
        read: gives the dense model's.
        config: of the mixture.
    """
    match = re.fullmatch(r"layers\.(\d+)\.moe\.(router\.weight|experts\.w_up|experts\.w_down)", name)
    if match is None:
        return read(name)
    dense = f"layers.{match[1]}.feed_forward."
    if match[2] == "router.weight":
        like_HD = read(dense + "up.weight")
        copies = how.num_experts // how.split
        rows_ND = _normal((copies, like_HD.shape[1]), how.seed, name) * how.router_std
        return rows_ND.repeat_interleave(how.split, dim=0).to(like_HD.dtype)
    if match[2] == "experts.w_up":
        wanted = ("gate", "up") if config.model.activation in GATED else ("up",)
        up_GHD = torch.stack([read(f"{dense}{part}.weight") for part in wanted])
        return torch.stack(list(_experts(up_GHD, 1, int(match[1]), "w_up", how)))
    return torch.stack(list(_experts(read(dense + "down.weight"), 1, int(match[1]), "w_down", how)))


def _experts(weight: Tensor, dim: int, layer: int, kind: str, how: Upcycling) -> Iterator[Tensor]:
    """Each expert's slice of a dense weight whose hidden units are dimension ``dim``."""
    parts = weight.chunk(how.split, dim=dim)
    copies = how.num_experts // how.split
    quiet = copies - round(copies * how.noise_share)
    for e in range(how.num_experts):
        own = parts[e % how.split].clone()
        if how.reinit:
            _draw_anew(own, dim, redrawn_units(own.shape[dim], layer, e, how), f"{layer}/{kind}/{e}", how.seed)
        if how.noise and e // how.split >= quiet:
            spread = own.float().std()
            own += (_normal(tuple(own.shape), how.seed, f"noise/{layer}/{kind}/{e}") * how.noise * spread).to(own.dtype)
        yield own


def redrawn_units(units: int, layer: int, expert: int, how: Upcycling) -> Tensor:
    """Hidden units of one expert that are drawn anew: the same in all its weights."""
    order = torch.randperm(units, generator=_generator(how.seed, f"units/{layer}/{expert}"))
    return order[: round(units * how.reinit)].sort().values


def _draw_anew(own: Tensor, dim: int, units: Tensor, key: str, seed: int) -> None:
    """Normal values with mean and deviation of what they replace, in each matrix by itself (arXiv:2502.19261, 3.2)."""
    matrices = own.unbind(0) if own.dim() == 3 else [own]
    for i, matrix in enumerate(matrices):
        axis = dim - (own.dim() - matrix.dim())
        old = matrix.index_select(axis, units).float()
        if old.numel() > 1:
            new = old.mean() + old.std() * _normal(tuple(old.shape), seed, f"reinit/{key}/{i}")
            matrix.index_copy_(axis, units, new.to(own.dtype))


def _normal(shape: tuple[int, ...], seed: int, key: str) -> Tensor:
    return torch.randn(shape, generator=_generator(seed, key))


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"upcycle/{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
