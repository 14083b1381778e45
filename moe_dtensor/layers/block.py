"""One transformer block. B sequences, S positions, D width, E experts."""

from __future__ import annotations

from torch import Tensor, nn

from moe_dtensor.config.resolve import block_norms, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.latent_attention import build_attention
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.norm import build_norm
from moe_dtensor.layers.positions import Positions
from moe_dtensor.layers.tokens import Tokens


class Block(nn.Module):
    """Attention, then experts or a dense feed-forward, each added to the stream; both read the same one with
    ``model.parallel_block``.

    ``model.norm_at`` says whether they read the normalised stream (pre), give what is then normalised (post), or both.
    """

    attention_norm: nn.Module
    ffn_norm: nn.Module
    attention_post_norm: nn.Module
    ffn_post_norm: nn.Module

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        for name in block_norms(config):
            self.add_module(name, build_norm(config))
        self.attention = build_attention(config, layer)
        self.is_moe = layer in moe_layers(config)
        if self.is_moe:
            self.moe = MoE(config, layer)
        else:
            model = config.model
            self.feed_forward = FeedForward(model.dim, model.hidden_dim, model.activation, model.ffn_bias)
        self.has_pre, self.has_post = (config.model.norm_at in (at, "both") for at in ("pre", "post"))
        self.is_parallel = config.model.parallel_block
        self.residual_scale = config.model.residual_scale

    def forward(self, x_BSD: Tensor, positions: Positions, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The stream ``(B, S, D)`` after the block, and the record of its routing if it has experts."""
        h_BSD = self.attention_norm(x_BSD) if self.has_pre else x_BSD
        y_BSD = self.attention(h_BSD, positions)
        sum_BSD = self._add(x_BSD, self.attention_post_norm(y_BSD) if self.has_post else y_BSD)
        x_BSD = x_BSD if self.is_parallel else sum_BSD
        h_BSD = self.ffn_norm(x_BSD) if self.has_pre else x_BSD
        record_R = None
        if self.is_moe:
            y_BSD, record_R = self.moe(h_BSD, tokens)
        else:
            y_BSD = self.feed_forward(h_BSD)
        return self._add(sum_BSD, self.ffn_post_norm(y_BSD) if self.has_post else y_BSD), record_R

    def _add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale)
