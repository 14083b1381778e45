"""One transformer block, and one for multi-token prediction, which predicts one token further ahead (DeepSeek-V3,
arXiv:2412.19437, section 2.2).

B sequences, S positions, D width, E experts, k from 1 to ``model.mtp_depth``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from moe_dtensor.config.resolve import block_norms, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.cross_entropy import IGNORED
from moe_dtensor.layers.attention import build_attention
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.positions import Positions
from moe_dtensor.layers.tokens import Tokens
from moe_dtensor.layers.weights import Linear, build_norm


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


class MtpBlock(Block):
    """A block that reads the stream beside the embedding of the k-th next token (eq. 21 and 22)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mtp_embedding_norm = build_norm(config)
        self.mtp_stream_norm = build_norm(config)
        self.mtp_projection = Linear(2 * config.model.dim, config.model.dim)
        self.mtp_norm = build_norm(config)

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, ahead_BSD: Tensor, positions: Positions, tokens: Tokens
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The stream ``(B, S, D)`` of the depth before and the embedding of the token ahead, to the stream, the record
        of its routing, and what the head reads."""
        joined = torch.cat([self.mtp_embedding_norm(ahead_BSD), self.mtp_stream_norm(x_BSD)], dim=-1)
        x_BSD, record_R = super().forward(self.mtp_projection(joined), positions, tokens)
        return x_BSD, record_R, self.mtp_norm(x_BSD)


def tokens_ahead(tokens_BS: Tensor, depth: int) -> Tensor:
    """The ``depth``-th next token of each position. At the end, where there is no label, the sequence's last one."""
    last_B1 = tokens_BS[:, -1:]
    return torch.cat([tokens_BS[:, depth:], last_B1.expand(-1, min(depth, tokens_BS.shape[1]))], dim=1)


def labels_ahead(labels_BS: Tensor, documents_BS: Tensor | None, depth: int) -> Tensor:
    """What depth k predicts at a position: the label k positions on.

    None (:data:`IGNORED`) in the last k positions, where any label from here to there is none, and where it lies in
    another document than the position.
    """
    there_BS = labels_BS.roll(-depth, 1)
    holds_BS = torch.ones_like(labels_BS, dtype=torch.bool)
    for shift in range(depth + 1):
        holds_BS &= labels_BS.roll(-shift, 1) != IGNORED
    if documents_BS is not None:
        holds_BS &= documents_BS.roll(-depth, 1) == documents_BS
    holds_BS[:, -depth:] = False
    return there_BS.where(holds_BS, IGNORED)


class AlsoMinimize(Function):
    """The first loss, reported as it is; the gradient that it gets goes to the second one too."""

    @staticmethod
    def forward(ctx, loss_B, other_B):
        """``loss_B``."""
        return loss_B.clone()

    @staticmethod
    def backward(ctx, grad_B):
        """The same for both."""
        return grad_B, grad_B
