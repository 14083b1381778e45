"""Attention of the oracle: one head after the other, a mask written out, rotation by complex numbers.

B sequences, S positions, D width, H heads, C head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_dtensor.config.schema import Config


class Attention:
    """Of one block, with its weights by their names in it."""

    def __init__(self, config: Config, layer: int, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        model = config.model
        self.window = model.window if _at(model.window_layers, layer, "window") == "window" else 0
        self.rotates = _at(model.rope_layers, layer, "rope") == "rope"

    def run(self, x_BSD: Tensor, documents_BS: Tensor | None) -> Tensor:
        """``(B, S, D)`` in and out."""
        model = self.config.model
        B, S, _ = x_BSD.shape
        positions_BS = torch.arange(S).expand(B, S)
        if documents_BS is not None:
            positions_BS = positions_BS - _first_positions(documents_BS)
        heads = self._latent(x_BSD, positions_BS) if model.kv_rank else self._plain(x_BSD, positions_BS)
        seen_BSS = self._seen(S, documents_BS)
        outputs = []
        for h, (q, k, v) in enumerate(heads):
            scores_BSS = q @ k.transpose(1, 2) * model.attention_scale
            highest = scores_BSS.detach().amax(-1, keepdim=True)
            weight_BSS = (scores_BSS - highest).exp() * seen_BSS
            total = weight_BSS.sum(-1, keepdim=True)
            if model.sinks:
                total = total + (self.weights["sinks"][h] - highest).exp()
            outputs.append(weight_BSS / total @ v)
        y = torch.cat(outputs, dim=-1)
        if model.attention_gate:
            y = y / (1 + (-self._linear("gate", x_BSD)).exp())
        return self._linear("wo", y) + (self.weights["output_bias"] if model.attention_bias == "all" else 0)

    def _plain(self, x_BSD: Tensor, positions_BS: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Query, key and value of each head."""
        model = self.config.model
        q, k, v = (self._linear(name, x_BSD) for name in ("wq", "wk", "wv"))
        if model.qk_norm == "full":
            q, k = self._rms("q_norm", q, model.norm_eps), self._rms("k_norm", k, model.norm_eps)
        if model.clip_qkv:
            q, k, v = (
                t.maximum(t.new_tensor(-model.clip_qkv)).minimum(t.new_tensor(model.clip_qkv)) for t in (q, k, v)
            )
        q, k, v = (t.reshape(*t.shape[:2], -1, model.head_dim) for t in (q, k, v))
        if model.qk_norm == "head":
            q, k = self._rms("q_norm", q, model.norm_eps), self._rms("k_norm", k, model.norm_eps)
        r = model.rotary_dim
        q, k = (torch.cat([self._rotate(t[..., :r], positions_BS), t[..., r:]], dim=-1) for t in (q, k))
        if model.qk_norm == "head_after_rope":
            q, k = self._rms("q_norm", q, model.norm_eps), self._rms("k_norm", k, model.norm_eps)
        group = model.num_heads // model.num_kv_heads
        return [(q[:, :, h], k[:, :, h // group], v[:, :, h // group]) for h in range(model.num_heads)]

    def _latent(self, x_BSD: Tensor, positions_BS: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same, made of latents."""
        model = self.config.model
        if model.q_rank:
            q = self._linear("wq_b", self._rms("q_a_norm", self._linear("wq_a", x_BSD), 1e-6))
        else:
            q = self._linear("wq", x_BSD)
        made = self._linear("wkv_a", x_BSD)
        kv = self._linear("wkv_b", self._rms("kv_a_norm", made[..., : model.kv_rank], 1e-6))
        shared = self._rotate(made[..., model.kv_rank :].unsqueeze(2), positions_BS)[:, :, 0]
        heads = []
        for q_h, kv_h in zip(q.chunk(model.num_heads, -1), kv.chunk(model.num_heads, -1), strict=True):
            turned = self._rotate(q_h[..., model.nope_dim :].unsqueeze(2), positions_BS)[:, :, 0]
            query = torch.cat([q_h[..., : model.nope_dim], turned], dim=-1)
            heads.append((query, torch.cat([kv_h[..., : model.nope_dim], shared], -1), kv_h[..., model.nope_dim :]))
        return heads

    def _seen(self, length: int, documents_BS: Tensor | None) -> Tensor:
        """Which keys each query sees, ``(B or 1, S, S)``."""
        behind = torch.arange(length)[:, None] - torch.arange(length)
        seen = (behind >= 0)[None]
        if self.window:
            seen = seen & (behind < self.window)
        return seen if documents_BS is None else seen & (documents_BS[:, :, None] == documents_BS[:, None, :])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0)

    def _rms(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * self.weights[name + ".weight"]

    def _rotate(self, x_BSHC: Tensor, positions_BS: Tensor) -> Tensor:
        """Pair (j, j + C/2) is a complex number, turned by position * frequency and stretched."""
        if not self.rotates:
            return x_BSHC
        half, rope = x_BSHC.shape[-1] // 2, self.config.rope
        theta = (self.window and self.config.model.window_theta) or self.config.model.rope_theta
        scaled = rope.scaling != "none" and (rope.scale_windows or not self.window)
        turns = [self._turn(j, half, theta, positions_BS.shape[1], scaled) for j in range(half)]
        stretch = torch.tensor([self._stretch() if scaled else 1.0], dtype=torch.float64)
        turn = torch.polar(stretch, positions_BS[:, :, None, None] * torch.tensor(turns, dtype=torch.float64))
        z = torch.complex(x_BSHC[..., :half].contiguous(), x_BSHC[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def _turn(self, j: int, half: int, theta: float, length: int, scaled: bool) -> float:
        """Radians from one position to the next, of pair j."""
        rope = self.config.rope
        turn = theta ** (-j / half)
        if not scaled:
            return turn
        if rope.scaling == "longrope":
            return turn / (rope.long_factors if length > rope.original_length else rope.short_factors)[j]
        kept = 0.0
        if rope.scaling == "llama3":
            wavelength = 2 * math.pi / turn
            kept = (rope.original_length / wavelength - rope.low) / (rope.high - rope.low)
        elif rope.scaling == "yarn":
            ends = [
                half * math.log(rope.original_length / (2 * math.pi * turns), theta)
                for turns in (rope.beta_fast, rope.beta_slow)
            ]
            if rope.truncate:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            ends = [max(ends[0], 0), min(ends[1], 2 * half - 1)]
            kept = 1 - (j - ends[0]) / max(ends[1] - ends[0], 0.001)
        kept = min(max(kept, 0.0), 1.0)
        return kept * turn + (1 - kept) * turn / rope.factor

    def _stretch(self) -> float:
        rope = self.config.rope
        if rope.attention_factor or rope.factor <= 1:
            return rope.attention_factor or 1.0
        if rope.scaling == "yarn":
            return 1 + math.log(rope.factor) / 10
        if rope.scaling == "longrope":
            return math.sqrt(1 + math.log(rope.factor, rope.original_length))
        return 1.0


def _at(pattern: tuple[str, ...], layer: int, default: str) -> str:
    return pattern[layer % len(pattern)] if pattern else default


def _first_positions(documents_BS: Tensor) -> Tensor:
    """Position at which each token's document starts in its sequence."""
    first = torch.zeros_like(documents_BS)
    for b, row in enumerate(documents_BS.tolist()):
        for s, document in enumerate(row):
            first[b, s] = s if s == 0 or document != row[s - 1] else first[b, s - 1]
    return first
