"""One transformer block. B sequences, S positions, D width, E experts."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.attention import Attention
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.norm import build_norm
from moe_dtensor.layers.rope import Positions
from moe_dtensor.layers.tokens import Tokens


class Block(nn.Module):
    """Attention, then experts or a dense feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = build_norm(config)
        self.is_moe = layer in moe_layers(config)
        if self.is_moe:
            self.moe = MoE(config, layer)
        else:
            self.feed_forward = FeedForward(config.model.dim, config.model.hidden_dim, config.model.activation)

    def forward(self, x_BSD: Tensor, positions: Positions, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The stream ``(B, S, D)`` after the block, and the record of its routing if it has experts."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), positions)
        h_BSD = self.ffn_norm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.feed_forward(h_BSD), None
        y_BSD, record_R = self.moe(h_BSD, tokens)
        return x_BSD + y_BSD, record_R
