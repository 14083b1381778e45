"""Which experts a token goes to: what ``moe.router`` names.

G routing groups, T tokens of a group, C tokens that an expert takes, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.config.load import load_object
from moe_dtensor.config.resolve import expert_takes
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.library import define
from moe_dtensor.kernels.sinkhorn import sinkhorn
from moe_dtensor.layers.tokens import Tokens, uniform_noise


class Assignment:
    """How experts are chosen in training. A class of your own derives from this one and overrides ``__call__``.

    Args:
        config: resolved.
        layer: index of the block.
    """

    over_groups = False
    """Whether a token's choice depends on its routing group. If so the logits are brought together first, and
    evaluation, which must not see later tokens, takes plain top-k."""
    forced = False
    """Whether it looks at no logits; it then holds in evaluation too."""
    variable = False
    """Whether tokens may go to any number of experts: those whose ranking is not -inf."""

    def __init__(self, config: Config, layer: int) -> None:
        pass

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        """What the choice goes by, ``(G, T, E)``: each token takes the K highest. No gradient passes through."""
        raise NotImplementedError


class TopK(Assignment):
    """Each token's K highest (Shazeer et al., arXiv:1701.06538), without balancing."""

    def __init__(self, config: Config, layer: int) -> None:
        self.by_score = goes_by_score(config)
        self.score = config.moe.score

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        """Each token by itself."""
        return self.by_logits(logits_GTE)

    def by_logits(self, logits: Tensor) -> Tensor:
        """The same; nothing but the logits matters."""
        return score(logits, self.score) if self.by_score else logits


class Sinkhorn(Assignment):
    """Balanced assignment: top-k of the Sinkhorn-normalised scores of a routing group.

    After S-BASE (arXiv:2202.01169): assignment without gradient, gate from the raw scores.
    """

    over_groups = True

    def __init__(self, config: Config, layer: int) -> None:
        self.iterations = config.moe.sinkhorn_iterations
        self.by_score = goes_by_score(config)

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        """Balance over the T tokens of each group: Sinkhorn's matrix, or its logarithm where only the order counts."""
        log_GTE = round_to_ties(sinkhorn(logits_GTE, self.iterations))
        return log_GTE.exp() if self.by_score else log_GTE

    def row_error(self, ranking: Tensor) -> Tensor:
        """How far the rows of the matrix are from their sum of 1, summed; its columns are exact."""
        return ((ranking if self.by_score else ranking.exp()).sum(-1) - 1).abs().sum()


class ExpertChoice(Assignment):
    """Each expert takes the K T / E tokens (rounded up) of a routing group that score highest (arXiv:2202.09368).

    A token may be taken by none or by many. For training only: the choice sees later tokens.
    """

    over_groups = True
    variable = True

    def __init__(self, config: Config, layer: int) -> None:
        self.score = config.moe.score
        self.takes = expert_takes(config)

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        """Scores of the experts that take a token, -inf for the others."""
        return _taken(round_to_ties(score(logits_GTE, self.score)), self.takes)


def _highest(score_GTE: Tensor, takes: int) -> Tensor:
    # A stable sort: among equal scores the earlier token.
    token_GCE = score_GTE.sort(dim=1, descending=True, stable=True).indices[:, :takes]
    taken_GTE = torch.full_like(score_GTE, -math.inf, memory_format=torch.contiguous_format)
    return taken_GTE.scatter_(1, token_GCE, score_GTE.gather(1, token_GCE))


# An operator: see moe_dtensor.layers.balance.
_taken = define(
    "taken_by_experts(Tensor score, SymInt takes) -> Tensor",
    _highest,
    lambda score_GTE, takes: torch.empty_like(score_GTE, memory_format=torch.contiguous_format),
)


class Forced(Assignment):
    """K different experts by chance, whatever the logits: for benchmarks, and Hash Layers (arXiv:2106.04426).

    Sampling without replacement by the Gumbel trick: the K highest of ``log weight + Gumbel noise``.
    """

    forced = True

    def __init__(self, config: Config, layer: int) -> None:
        self.by_id = config.moe.router == "hash"
        self.skewed = config.moe.router == "zipf"
        # The hash of a word is the same in every run.
        self.stream = layer if self.by_id else 1_000_003 * (config.training.seed + 1) + layer

    def __call__(self, logits_GTE: Tensor, tokens_GT: Tokens) -> Tensor:
        """By the token's id (hash) or its number in the run (uniform; zipf: expert e weighs 1 / (e + 1))."""
        experts = logits_GTE.shape[-1]
        id_E = torch.arange(experts, device=logits_GTE.device)
        key_GT = tokens_GT.id_BS if self.by_id else tokens_GT.number_BS
        gumbel_GTE = -(-uniform_noise(key_GT[..., None] * experts + id_E, self.stream).log()).log()
        return gumbel_GTE - (id_E + 1).double().log() if self.skewed else gumbel_GTE


def goes_by_score(config: Config) -> bool:
    """Whether something is added to the ranking (a bias, or in sums over groups of experts), so that it must be scores;
    else logarithms give the same order."""
    moe = config.moe
    return moe.score_before_top_k and (moe.selection_bias or moe.expert_groups > 0)


def score(logits: Tensor, name: str) -> Tensor:
    """``softmax`` over the last dimension, or ``sigmoid``."""
    return logits.softmax(-1) if name == "softmax" else logits.sigmoid()


def round_to_ties(scores: Tensor) -> Tensor:
    """Make scores that are equal up to rounding errors equal, so that the lowest index wins among them.

    Balancing makes exact ties: in a group whose tokens are all alike (a run of spaces) every expert has the same
    share. Were the last bit to decide, meshes that sum in another order would route differently.
    """
    steps = 2.0**40 if scores.dtype == torch.float64 else 2.0**16
    return (scores * steps).round() / steps


ASSIGNMENTS: dict[str, Callable[[Config, int], Assignment]] = {
    "sinkhorn": Sinkhorn,
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "hash": Forced,
    "uniform": Forced,
    "zipf": Forced,
}


def build_assignment(config: Config, layer: int) -> Assignment:
    """The assignment that ``moe.router`` names, ours or the user's."""
    name = config.moe.router
    build = ASSIGNMENTS[name] if name in ASSIGNMENTS else load_object("moe.router", name, is_assignment, OWN)
    return build(config, layer)


OWN = "a class that derives from moe_dtensor.layers.assignment.Assignment"


def is_assignment(found: Any) -> bool:
    """Whether an object can stand in ``moe.router``."""
    return isinstance(found, type) and issubclass(found, Assignment)
