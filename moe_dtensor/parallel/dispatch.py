"""How tokens reach the experts of other ranks and come back. B sequences, S positions, D width, K choices."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import Experts, run_experts


class AllGatherDispatch:
    """Bring all tokens to every rank, let each run its own experts on them, sum what comes back.

    No counts are exchanged, and the K outputs of a token are summed before they travel. The shared
    expert, split over the same ranks, rides along.

    Args:
        enter: all tokens from a rank's own, with gradient.
        leave: the sum of the ranks' shares, back to a rank's own tokens.
        enter_data: ``enter`` without gradient, for the choices.
    """

    def __init__(
        self,
        enter: Callable[[Tensor], Tensor],
        leave: Callable[[Tensor], Tensor],
        enter_data: Callable[[Tensor], Tensor],
    ) -> None:
        self.enter = enter
        self.leave = leave
        self.enter_data = enter_data

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor
    ) -> Tensor:
        """``(B, S, D)`` of a rank's own tokens in and out."""
        y_BSD = run_experts(experts, shared, self.enter(x_BSD), self.enter(gate_BSK), self.enter_data(expert_BSK))
        return self.leave(y_BSD)
