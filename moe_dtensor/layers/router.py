"""The router: which experts, and with what weight. B sequences, S positions, D width, E experts, K choices,
G routing groups, T tokens of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dtensor.config.objects import load_object
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.sinkhorn import sinkhorn


class Assignment(Protocol):
    """How experts are chosen in training: the part that ``moe.router`` names.

    A class of your own takes the resolved :class:`Config` in its constructor.
    """

    over_groups: bool
    """Whether a token's choice depends on its routing group. If so the logits are brought together first."""
    gate: str
    """Score that weights an expert's output: ``sigmoid`` or ``softmax`` (over all E)."""

    def __call__(self, logits_GTE: Tensor, top_k: int) -> Tensor:
        """Expert ids ``(G, T, K)``, int64, distinct for each token. No gradient passes through."""


class Sinkhorn:
    """Balanced assignment: top-k of the Sinkhorn-normalised scores of a routing group.

    After S-BASE (arXiv:2202.01169): assignment without gradient, gate from the raw scores. It sees later
    tokens of the group; evaluation uses plain top-k.
    """

    over_groups = True

    def __init__(self, config: Config) -> None:
        self.iterations = config.moe.sinkhorn_iterations
        self.gate = "sigmoid" if config.moe.top_k == 1 else "softmax"

    def __call__(self, logits_GTE: Tensor, top_k: int) -> Tensor:
        """Balance over the T tokens of each group, then take each token's K best."""
        return top_k_of_rounded(sinkhorn(logits_GTE, self.iterations), top_k)


def top_k_of_rounded(scores_GTE: Tensor, top_k: int) -> Tensor:
    """Indices ``(G, T, K)`` of the K highest scores; those equal up to rounding errors go by lowest index.

    Balancing makes exact ties: in a group whose tokens are all alike (a run of spaces) every expert has the same
    share. Were the last bit to decide, meshes that sum in another order would route differently.
    """
    steps = 2.0**40 if scores_GTE.dtype == torch.float64 else 2.0**16
    num_experts = scores_GTE.shape[-1]
    last_first_E = torch.arange(num_experts - 1, -1, -1, device=scores_GTE.device)
    # One integer orders by rounded score, then by index.
    key_GTE = (scores_GTE * steps).round().to(torch.int64) * num_experts + last_first_E
    return key_GTE.topk(top_k, dim=-1).indices


class TopK:
    """Each token's K highest scores (Shazeer et al., arXiv:1701.06538), without balancing."""

    over_groups = False
    gate = "softmax"

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, logits_GTE: Tensor, top_k: int) -> Tensor:
        """Each token by itself."""
        return logits_GTE.topk(top_k, dim=-1).indices


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
        """Gates ``(B, S, K)`` in at least float32, and expert ids ``(B, S, K)``."""
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        logits_BSE = F.linear(x_BSD.to(dtype), self.weight.to(dtype))
        expert_BSK = self.choose(logits_BSE.detach())
        scores = logits_BSE.sigmoid() if self.assignment.gate == "sigmoid" else logits_BSE.softmax(-1)
        return scores.gather(-1, expert_BSK), expert_BSK

    def choose(self, logits_BSE: Tensor) -> Tensor:
        """Expert ids ``(B, S, K)``: the assignment in training, plain top-k in evaluation."""
        if not self.training:
            return logits_BSE.topk(self.top_k, dim=-1).indices
        if not self.assignment.over_groups:
            return self.assignment(logits_BSE, self.top_k)
        whole = self.gather_positions(logits_BSE)
        sequences, length, experts = whole.shape
        groups_GTE = whole.reshape(sequences // self.group_sequences, self.group_sequences * length, experts)
        expert_GTK = self.assignment(groups_GTE, self.top_k)
        return self.own_positions(expert_GTK.reshape(sequences, length, self.top_k))


def _identity(x: Tensor) -> Tensor:
    return x
