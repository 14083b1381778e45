"""Plain causal attention by the kernels of FlashAttention 4 (the package ``flash-attn-4``), on Hopper and later.

Its functions are called beneath its own autograd, so that the compiler sees two operators. Heads lie beside one another
in a position, as projections give them; only what has gaps in the last axis, or is not aligned to 16 bytes, is copied.

B sequences, S positions, H query heads, G key and value heads, C width of a query or key, V of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.library import define


def flash_attention(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGV: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` over the keys up to each query's own, ``(B, S, H, V)``, contiguous; in bf16 or
    fp16."""
    return _FlashAttention.apply(q_BSHC, k_BSGC, v_BSGV, scale)


class _FlashAttention(Function):
    @staticmethod
    def forward(ctx, q_BSHC, k_BSGC, v_BSGV, scale):
        y_BSHV, lse_BHS = _forward(q_BSHC, k_BSGC, v_BSGV, scale)
        ctx.save_for_backward(q_BSHC, k_BSGC, v_BSGV, y_BSHV, lse_BHS)
        ctx.scale = scale
        return y_BSHV

    @staticmethod
    def backward(ctx, dy_BSHV):
        return *_backward(dy_BSHV, *ctx.saved_tensors, ctx.scale), None


def _run_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import interface

    # Releases differ in what they give beside these two.
    y, lse, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
    return y, lse


def _run_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute import interface

    dq, dk, dv = _fake_backward(dy, q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    interface._flash_attn_bwd(
        q, k, v, y, dy, lse, softmax_scale=scale, causal=True, deterministic=deterministic, dq=dq, dk=dk, dv=dv
    )
    return dq, dk, dv


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, length, heads = q.shape[:3]
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(batch, heads, length, dtype=torch.float32)


def _fake_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward = define(
    "flash_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", _run_forward, _fake_forward
)
"""The output ``(B, S, H, V)``, and the logarithm of each softmax's sum, float32, ``(B, H, S)``."""
_backward = define(
    "flash_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
"""Gradients of q, k and v, contiguous."""
