"""Causal attention: grouped-query, and latent.

B sequences, S positions, N of them kept, D width, H query heads, C head width, R latent's width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import block_rotates, block_window, head_widths, is_latent
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.attention import attend, masked_attention
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


LATENT_EPS = 1e-6
"""Of the latents' norms, whatever ``model.norm_eps`` is: so are the published models."""


class LatentAttention(Attention):
    """Queries, keys and values are made of narrow latents (MLA, DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Of a head of queries or keys ``nope_dim`` dimensions are not rotated and ``rope_dim`` are; all heads share the
    rotated part of the keys. Every part of the heads makes the whole latents by itself. ``recall`` may keep what all
    heads share of a token, ``(B, 1, S, kv_rank + rope_dim)``; it gives back what is kept and which of it is seen.
    """

    def build_projections(self, config: Config) -> None:
        """The layers that :meth:`project` uses."""
        model = config.model
        self.nope_dim, self.rope_dim, self.v_dim, self.kv_rank = (
            model.nope_dim,
            model.rope_dim,
            model.v_dim,
            model.kv_rank,
        )
        self.q_rank = model.q_rank
        width = model.num_heads * (model.nope_dim + model.rope_dim)
        if model.q_rank:
            self.wq_a = Linear(model.dim, model.q_rank)
            self.q_a_norm = RMSNorm(model.q_rank, LATENT_EPS)
            self.wq_b = Linear(model.q_rank, width)
        else:
            self.wq = Linear(model.dim, width)
        self.wkv_a = Linear(model.dim, model.kv_rank + model.rope_dim)
        self.kv_a_norm = RMSNorm(model.kv_rank, LATENT_EPS)
        self.wkv_b = Linear(model.kv_rank, model.num_heads * (model.nope_dim + model.v_dim))
        self.recall: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None

    def key_value_layers(self) -> list[Layer]:
        """None: there is a key and a value for each query."""
        return []

    def attend_heads(self, x_BSD: Tensor, place: Place) -> Tensor:
        """What each head reads of whole sequences, ``(B, S, H, v_dim)``."""
        query_BSHC, latent_BSR, turned_BSC = self.project_latents(x_BSD, place)
        if self.recall is not None:
            new_BSW = torch.cat([self.to_sequences(latent_BSR), turned_BSC], dim=-1)
            held = self.recall(new_BSW[:, None])
            if held is not None:
                return self._attend_latents(query_BSHC, *held)
        return self._attend(query_BSHC, *self.expand(latent_BSR, turned_BSC), place)

    def project(self, x_BSD: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``(B, S, H, nope_dim + rope_dim)``, rotated, and values ``(B, S, H, v_dim)``."""
        query_BSHC, latent_BSR, turned_BSC = self.project_latents(x_BSD, place)
        return query_BSHC, *self.expand(latent_BSR, turned_BSC)

    def project_latents(self, x_BSD: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(B, S, H, nope_dim + rope_dim)``, rotated; latents ``(B, S, kv_rank)``, not yet in whole sequences;
        and what all heads share of the keys, ``(B, S, rope_dim)``, rotated."""
        q = self.wq_b(self.q_a_norm(self.wq_a(x_BSD))) if self.q_rank else self.wq(x_BSD)
        latent, shared = self.wkv_a(x_BSD).split((self.kv_rank, self.rope_dim), dim=-1)
        shared = self.to_sequences(shared)[:, :, None]
        q, turned = (
            self.to_sequences(q)
            .unflatten(-1, (-1, self.nope_dim + self.rope_dim))
            .split((self.nope_dim, self.rope_dim), dim=-1)
        )
        if self.rotates:
            turned, shared = rotate(turned, place.cos, place.sin), rotate(shared, place.cos, place.sin)
        return torch.cat((q, turned), dim=-1), self.kv_a_norm(latent), shared[:, :, 0]

    def expand(self, latent_BSR: Tensor, turned_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of each head."""
        kv = self.to_sequences(self.wkv_b(latent_BSR)).unflatten(-1, (-1, self.nope_dim + self.v_dim))
        k, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        shared = turned_BSC[:, :, None].expand(-1, -1, k.shape[2], -1)
        return torch.cat((k, shared), dim=-1), v

    def _attend_latents(self, query_BSHC: Tensor, held_B1NW: Tensor, seen: Tensor) -> Tensor:
        """The same without keys and values of heads: as ``q (W c) = (q W) c``, a head's map is applied to its query,
        and to the sum of latents that it reads (DeepSeek-V2, section 2.1.2)."""
        weight_HKR = self.wkv_b.local_weight("weight").unflatten(0, (-1, self.nope_dim + self.v_dim))
        key_HNR, value_HVR = weight_HKR.split((self.nope_dim, self.v_dim), dim=1)
        q, turned = query_BSHC.split((self.nope_dim, self.rope_dim), dim=-1)
        query_BSHW = torch.cat((torch.einsum("bshn,hnr->bshr", q, key_HNR), turned), dim=-1)
        latent_B1NR = held_B1NW[..., : self.kv_rank]
        read_BHSR = masked_attention(
            query_BSHW.transpose(1, 2), held_B1NW, latent_B1NR, seen, self.scale, self.own_sinks()
        )
        return torch.einsum("bhsr,hvr->bshv", read_BHSR, value_HVR)


def build_attention(config: Config, layer: int) -> Attention:
    """Latent attention if ``model.kv_rank`` says so."""
    return (LatentAttention if is_latent(config) else Attention)(config, layer)
