"""Latent attention. B sequences, S positions, N of them kept, D width, H heads, R latent's width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_dtensor.config.resolve import is_latent
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.attention import masked_attention
from moe_dtensor.layers.attention import Attention
from moe_dtensor.layers.positions import Place, rotate
from moe_dtensor.layers.weights import Layer, Linear, RMSNorm

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
