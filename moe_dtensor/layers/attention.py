"""Grouped-query causal attention. B sequences, S positions, D width, H query heads, C head width."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dtensor.config.schema import Config
from moe_dtensor.layers.norm import HeadsNorm, RMSNorm
from moe_dtensor.layers.rope import Positions, rotate
from moe_dtensor.layers.weights import Layer, Linear


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped keys and values (GQA, arXiv:2305.13245).

    How many heads it has is read off its weights, so a part of the heads is computed by the same code; ``sum_heads``
    then adds what is summed over heads of queries and of keys to that of the other parts. The projections take tokens
    in any order: ``to_sequences`` brings what they give into whole sequences, ``from_sequences`` back.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.head_dim = model.head_dim
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.wq = Linear(model.dim, width)
        self.wk = Linear(model.dim, kv_width)
        self.wv = Linear(model.dim, kv_width)
        self.wo = Linear(width, model.dim)
        self.qk_norm = model.qk_norm
        if model.qk_norm == "head":
            self.q_norm: Layer = RMSNorm(model.head_dim, model.norm_eps)
            self.k_norm: Layer = RMSNorm(model.head_dim, model.norm_eps)
        elif model.qk_norm == "full":
            self.q_norm = HeadsNorm(width, model.norm_eps)
            self.k_norm = HeadsNorm(kv_width, model.norm_eps)
        self.sum_heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _all_here
        self.to_sequences: Callable[[Tensor], Tensor] = _as_they_are
        self.from_sequences: Callable[[Tensor], Tensor] = _as_they_are

    def key_value_layers(self) -> list[Layer]:
        """The layers whose weights have a row for each unit of the key and value heads."""
        return [self.wk, self.wv, *([self.k_norm] if self.qk_norm == "full" else [])]

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        """Attend to earlier positions of the same sequence (and document); ``(B, S, D)`` in and out, if need be in the
        order that ``from_sequences`` gives."""
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm == "full":
            q, k = HeadsNorm.widen(q), HeadsNorm.widen(k)
            q_squares, k_squares = self.sum_heads(HeadsNorm.squares(q), HeadsNorm.squares(k))
            q, k = self.q_norm(q, q_squares), self.k_norm(k, k_squares)
        q, k, v = (self.to_sequences(t).unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        y_BHSC = F.scaled_dot_product_attention(
            rotate(q, positions).transpose(1, 2),
            rotate(k, positions).transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=positions.mask,
            is_causal=positions.mask is None,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return self.wo(self.from_sequences(y_BHSC.transpose(1, 2).flatten(2)))


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _all_here(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    return of_queries, of_keys
