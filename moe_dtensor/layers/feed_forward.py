"""The dense feed-forward, also used for shared experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import GATED
from moe_dtensor.kernels.experts.activation import activate, activate_pair
from moe_dtensor.layers.weights import Layer, Linear


class FeedForward(Layer):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` for gated activations (GLU variants, arXiv:2002.05202).

    May hold a part of the hidden units: ``sum_output`` then adds what the other parts give.

    Args:
        bias: whether each projection has one.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        if activation in GATED:
            self.gate = Linear(dim, hidden_dim, bias)
        self.up = Linear(dim, hidden_dim, bias)
        self.down = Linear(hidden_dim, dim)
        self.output_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.sum_output: Callable[[Tensor], Tensor] = _as_it_is

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` in and out."""
        y = self.sum_output(self.compute(x))
        # After the sum over parts of the hidden units, so that it is added once.
        return y if self.output_bias is None else y + self.local_weight("output_bias")

    def compute(self, x: Tensor) -> Tensor:
        """What the held hidden units give, ``(..., D)`` in and out."""
        if self.activation in GATED:
            return self.down(activate_pair(self.gate(x), self.up(x), self.activation))
        return self.down(activate(self.up(x).unsqueeze(-2), self.activation))


def _as_it_is(y: Tensor) -> Tensor:
    return y
