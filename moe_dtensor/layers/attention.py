"""Grouped-query causal attention. B sequences, S positions, D width, H query heads, C head width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import block_rotates, block_window, head_widths
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.attention import attend
from moe_dtensor.kernels.heads import norm_and_rotate, norm_parts_and_rotate, takes
from moe_dtensor.layers.positions import Place, Positions, rotate
from moe_dtensor.layers.weights import HeadsNorm, Layer, Linear, RMSNorm


class Attention(Layer):
    """Causal attention with rotary positions and grouped keys and values (GQA, arXiv:2305.13245).

    How many heads it has is read off its weights, so a part of the heads is computed by the same code; ``sum_heads``
    then adds what is summed over heads of queries and of keys to that of the other parts (and is its own adjoint),
    ``sum_output`` the output. The projections take tokens in any order: ``to_sequences`` brings what they give into
    whole sequences, ``from_sequences`` back; ``shards`` tells kernels the order, which is that of so many shards of the
    positions, one after the other. ``attend`` may be another that remembers keys and values.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        model, widths = config.model, head_widths(config)
        self.rotates, self.has_window = block_rotates(config, layer), block_window(config, layer) > 0
        self.clip_qkv, self.scale, self.backend = model.clip_qkv, model.attention_scale, model.attention_backend
        self.head_dim = model.head_dim
        self.qk_norm = model.qk_norm
        self.build_projections(config)
        self.wo = Linear(model.num_heads * widths.value, model.dim)
        self.output_bias = nn.Parameter(torch.zeros(model.dim)) if model.attention_bias == "all" else None
        self.gate = Linear(model.dim, model.num_heads * widths.value) if model.attention_gate else None
        self.sinks = nn.Parameter(torch.zeros(model.num_heads)) if model.sinks else None
        self.attend: Callable[..., Tensor] = attend
        self.sum_heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _all_here
        self.sum_output: Callable[[Tensor], Tensor] = _as_they_are
        self.to_sequences: Callable[[Tensor], Tensor] = _as_they_are
        self.from_sequences: Callable[[Tensor], Tensor] = _as_they_are
        self.shards = 1

    def build_projections(self, config: Config) -> None:
        """The layers that :meth:`project` uses."""
        model, biased = config.model, config.model.attention_bias != "none"
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.wq = Linear(model.dim, width, bias=biased)
        self.wk = Linear(model.dim, kv_width, bias=biased)
        self.wv = Linear(model.dim, kv_width, bias=biased)
        if model.qk_norm == "full":
            self.q_norm: RMSNorm | HeadsNorm = HeadsNorm(width, model.norm_eps)
            self.k_norm: RMSNorm | HeadsNorm = HeadsNorm(kv_width, model.norm_eps)
        elif model.qk_norm != "none":
            self.q_norm = RMSNorm(model.head_dim, model.norm_eps)
            self.k_norm = RMSNorm(model.head_dim, model.norm_eps)

    def key_value_layers(self) -> list[Layer]:
        """The layers whose weights have a row for each unit of the key and value heads."""
        return [self.wk, self.wv, *([self.k_norm] if self.qk_norm == "full" else [])]

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        """Attend to what each position sees of its sequence; ``(B, S, D)`` in and out, if need be in the order that
        ``from_sequences`` gives."""
        place = positions.window if self.has_window else positions.full
        y = self.from_sequences(self.attend_heads(x_BSD, place).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x_BSD).sigmoid()
        y_BSD = self.sum_output(self.wo(y))
        # After the sum over parts of the heads, so that it is added once.
        return y_BSD if self.output_bias is None else y_BSD + self.local_weight("output_bias")

    def attend_heads(self, x_BSD: Tensor, place: Place) -> Tensor:
        """What each head reads of whole sequences, ``(B, S, H, C)``."""
        return self._attend(*self.project(x_BSD, place), place)

    def _attend(self, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGV: Tensor, place: Place) -> Tensor:
        y_BHSV = self.attend(
            q_BSHC.transpose(1, 2),
            k_BSGC.transpose(1, 2),
            v_BSGV.transpose(1, 2),
            place.visible,
            scale=self.scale,
            sink_H=self.own_sinks(),
            backend=self.backend,
        )
        return y_BHSV.transpose(1, 2)

    def own_sinks(self) -> Tensor | None:
        """The sink of each head, if there are any."""
        return None if self.sinks is None else self.local_weight("sinks")

    def project(self, x_BSD: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of whole sequences, ``(B, S, heads, C)`` each, rotated."""
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self._has_kernel(q, place):
            v_BSGC = self.to_sequences(v).unflatten(-1, (-1, self.head_dim))
            q, k = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
            return *self._norm_and_rotate(q, k, place), v_BSGC
        if self.qk_norm == "full":
            q, k = HeadsNorm.widen(q), HeadsNorm.widen(k)
            q_squares, k_squares = self.sum_heads(HeadsNorm.squares(q), HeadsNorm.squares(k))
            q, k = self.q_norm(q, q_squares), self.k_norm(k, k_squares)
        if self.clip_qkv:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        q, k, v = (self.to_sequences(t).unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
        if self.qk_norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _has_kernel(self, q: Tensor, place: Place) -> bool:
        """Whether kernels do all that is done to queries and keys: heads are turned last."""
        plain = self.rotates and not self.clip_qkv and self.qk_norm != "head_after_rope"
        return plain and takes(q, self.head_dim, place.cos)

    def _norm_and_rotate(self, q: Tensor, k: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """In the order of the projections' tokens, ``(…, heads, C)``, to whole sequences."""
        rest = place.cos, place.sin, self.shards
        if self.qk_norm == "none":
            return norm_and_rotate(q, None, 0.0, *rest), norm_and_rotate(k, None, 0.0, *rest)
        q_norm, k_norm = self.q_norm, self.k_norm
        weights = q_norm.local_weight("weight"), k_norm.local_weight("weight")
        if isinstance(q_norm, HeadsNorm) and isinstance(k_norm, HeadsNorm) and self.sum_heads is not _all_here:
            widths = q_norm.dim, k_norm.dim
            return norm_parts_and_rotate((q, k), weights, widths, q_norm.eps, *rest, self.sum_heads)
        return norm_and_rotate(q, weights[0], q_norm.eps, *rest), norm_and_rotate(k, weights[1], k_norm.eps, *rest)


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _all_here(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    return of_queries, of_keys
