"""Gather with permute and unpermute with scatter, in which a kernel reads and writes the memory of other ranks.

R ranks, each with T tokens, share the experts; S = R * T. One kernel takes what would be an all-gather and
:data:`~moe_dtensor.kernels.experts.permute.permute`, and one what would be
:data:`~moe_dtensor.kernels.experts.permute.unpermute` and a reduce-scatter. Each is the other's gradient.

How ranks reach each other is said from outside, by the name of their group (:data:`PEERS`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moe_dtensor.kernels.experts.permute import unpermute
from moe_dtensor.kernels.library import define


class Peers(Protocol):
    """The ranks that share experts, as one of them sees them. All call alike, in the same order."""

    ranks: int

    def gather_permute(self, x_TD: Tensor, position_SK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """See :data:`gather_permute`."""

    def unpermute_scatter(self, y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None) -> Tensor:
        """See :data:`unpermute_scatter`."""


PEERS: dict[str, Peers] = {}
"""By the name of the group."""

gather_permute = define(
    "gather_permute(Tensor x, Tensor position, SymInt rows, str group) -> (Tensor, Tensor)",
    lambda x_TD, position_SK, rows, group: PEERS[group].gather_permute(x_TD, position_SK, rows),
    lambda x_TD, position_SK, rows, group: (
        x_TD.new_empty(rows, x_TD.shape[1]),
        x_TD.new_empty(position_SK.shape[0], x_TD.shape[1]),
    ),
)
"""``out[position[s, k]] = x[s]`` for the tokens of all ranks, ``(rows, D)``; and those tokens, ``(S, D)``."""

unpermute_scatter = define(
    "unpermute_scatter(Tensor y, Tensor position, Tensor? gate, str group) -> Tensor",
    lambda y_ND, position_SK, gate_SK, group: PEERS[group].unpermute_scatter(y_ND, position_SK, gate_SK),
    lambda y_ND, position_SK, gate_SK, group: y_ND.new_empty(position_SK.shape[0] // PEERS[group].ranks, y_ND.shape[1]),
)
"""``out[t] = sum over ranks of sum_k gate[s, k] * y[position[s, k]]`` for a rank's own tokens s, ``(T, D)``.

Each rank's sum is rounded before they are added, in the order of the ranks."""


def leave(y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None, group: str | None) -> Tensor:
    """Rows back to tokens, ``(T, D)``: :data:`unpermute_scatter`, or ``unpermute`` where there is no group."""
    if group is None:
        return unpermute(y_ND, position_SK, gate_SK)
    return unpermute_scatter(y_ND, position_SK, gate_SK, group)
