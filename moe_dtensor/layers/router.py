"""The router: which experts, and with what weight. B sequences, S positions, D width, E experts, K choices,
G routing groups, T tokens of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_dtensor.config.objects import load_object
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.router import router_logits, top_k_gates
from moe_dtensor.kernels.sinkhorn import sinkhorn


class Assignment(Protocol):
    """How experts are chosen in training: the part that ``moe.router`` names.

    A class of your own takes the resolved :class:`Config` in its constructor.
    """

    over_groups: bool
    """Whether a token's choice depends on its routing group. If so the logits are brought together first."""
    score: str
    """What weights an expert's output: ``sigmoid`` of its logit, or ``softmax`` over all E."""

    def __call__(self, logits_GTE: Tensor) -> Tensor:
        """What the choice goes by, ``(G, T, E)``: each token takes the K highest. No gradient passes through."""


class Sinkhorn:
    """Balanced assignment: top-k of the Sinkhorn-normalised scores of a routing group.

    After S-BASE (arXiv:2202.01169): assignment without gradient, gate from the raw scores. It sees later
    tokens of the group; evaluation uses plain top-k.
    """

    over_groups = True

    def __init__(self, config: Config) -> None:
        self.iterations = config.moe.sinkhorn_iterations
        self.score = "sigmoid" if config.moe.top_k == 1 else "softmax"

    def __call__(self, logits_GTE: Tensor) -> Tensor:
        """Balance over the T tokens of each group."""
        return round_to_ties(sinkhorn(logits_GTE, self.iterations))


def round_to_ties(scores: Tensor) -> Tensor:
    """Make scores that are equal up to rounding errors equal, so that the lowest index wins among them.

    Balancing makes exact ties: in a group whose tokens are all alike (a run of spaces) every expert has the same
    share. Were the last bit to decide, meshes that sum in another order would route differently.
    """
    steps = 2.0**40 if scores.dtype == torch.float64 else 2.0**16
    return (scores * steps).round() / steps


class TopK:
    """Each token's K highest scores (Shazeer et al., arXiv:1701.06538), without balancing."""

    over_groups = False
    score = "softmax"

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, logits_GTE: Tensor) -> Tensor:
        """Each token by itself."""
        return logits_GTE


ASSIGNMENTS: dict[str, Callable[[Config], Assignment]] = {"sinkhorn": Sinkhorn, "topk": TopK}


def build_assignment(config: Config) -> Assignment:
    """The assignment that ``moe.router`` names, ours or the user's."""
    name = config.moe.router
    return ASSIGNMENTS[name](config) if name in ASSIGNMENTS else load_object("moe.router", name)(config)


class Router(nn.Module):
    """Scores every token against every expert, chooses K, and weights them.

    Scores are computed in at least float32. ``gather_positions`` brings the positions of a sequence
    together and ``own_positions`` takes this module's part back; both are the identity where whole
    sequences are at hand.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.model.dim))
        self.top_k = config.moe.top_k
        self.group_sequences = config.moe.group_sequences
        self.assignment = build_assignment(config)
        self.gather_positions: Callable[[Tensor], Tensor] = _identity
        self.own_positions: Callable[[Tensor], Tensor] = _identity

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``(B, S, K)`` in at least float32, and expert ids ``(B, S, K)`` int64."""
        lead = x_BSD.shape[:2]
        logits_TE = router_logits(x_BSD.flatten(0, 1), self.weight)
        ranking_BSE = self.rank(logits_TE.detach().unflatten(0, lead))
        gate_TK, expert_TK = top_k_gates(
            logits_TE, self.top_k, score=self.assignment.score, ranking_TE=ranking_BSE.flatten(0, 1)
        )
        return gate_TK.unflatten(0, lead), expert_TK.unflatten(0, lead)

    def rank(self, logits_BSE: Tensor) -> Tensor:
        """What the choice goes by, ``(B, S, E)``: the assignment's in training, the logits in evaluation."""
        if not self.training:
            return logits_BSE
        if not self.assignment.over_groups:
            return self.assignment(logits_BSE)
        whole = self.gather_positions(logits_BSE)
        sequences, length, experts = whole.shape
        groups_GTE = whole.reshape(sequences // self.group_sequences, self.group_sequences * length, experts)
        return self.own_positions(self.assignment(groups_GTE).view(whole.shape))


def _identity(x: Tensor) -> Tensor:
    return x
