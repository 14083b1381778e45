"""Latent attention. B sequences, S positions, D width, H heads."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_dtensor.config.resolve import is_latent
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.attention import Attention
from moe_dtensor.layers.positions import Place, rotate
from moe_dtensor.layers.weights import Layer, Linear, RMSNorm

LATENT_EPS = 1e-6
"""Of the latents' norms, whatever ``model.norm_eps`` is: so are the published models."""


class LatentAttention(Attention):
    """Queries, keys and values are made of narrow latents (MLA, DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Of a head of queries or keys ``nope_dim`` dimensions are not rotated and ``rope_dim`` are; all heads share the
    rotated part of the keys. Every part of the heads makes the whole latents by itself.
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

    def key_value_layers(self) -> list[Layer]:
        """None: there is a key and a value for each query."""
        return []

    def project(self, x_BSD: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``(B, S, H, nope_dim + rope_dim)``, rotated, and values ``(B, S, H, v_dim)``."""
        q = self.wq_b(self.q_a_norm(self.wq_a(x_BSD))) if self.q_rank else self.wq(x_BSD)
        latent, shared = self.wkv_a(x_BSD).split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.to_sequences(self.wkv_b(self.kv_a_norm(latent))).unflatten(-1, (-1, self.nope_dim + self.v_dim))
        k, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        shared = self.to_sequences(shared)[:, :, None]
        q, turned = (
            self.to_sequences(q)
            .unflatten(-1, (-1, self.nope_dim + self.rope_dim))
            .split((self.nope_dim, self.rope_dim), dim=-1)
        )
        if self.rotates:
            turned, shared = rotate(turned, place.cos, place.sin), rotate(shared, place.cos, place.sin)
        shared = shared.expand(-1, -1, k.shape[2], -1)
        return torch.cat((q, turned), dim=-1), torch.cat((k, shared), dim=-1), v


def build_attention(config: Config, layer: int) -> Attention:
    """Latent attention if ``model.kv_rank`` says so."""
    return (LatentAttention if is_latent(config) else Attention)(config, layer)
