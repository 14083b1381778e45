"""The dense feed-forward, also used for shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dtensor.config.resolve import GATED
from moe_dtensor.kernels.experts.activation import activate, activate_pair
from moe_dtensor.layers.weights import Linear


class FeedForward(nn.Module):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` for gated activations (GLU variants, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        if activation in GATED:
            self.gate = Linear(dim, hidden_dim)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` in and out."""
        if self.activation in GATED:
            return self.down(activate_pair(self.gate(x), self.up(x), self.activation))
        return self.down(activate(self.up(x).unsqueeze(-2), self.activation))
