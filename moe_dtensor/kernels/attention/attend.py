"""One way to say what attention computes, and the choice of how.

Plain causal attention is ``scaled_dot_product_attention``, which picks the fastest there is. Documents, windows and
sinks are FlexAttention's on a GPU, which skips the blocks of keys that no query of a block sees; else a mask.

B sequences, S positions, H query heads, G key and value heads, C width of a query or key, V of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dtensor.kernels.attention.plain import plain_attention
from moe_dtensor.kernels.attention.visible import Visible, build_blocks, first_visible

LEAST_WIDTH = 16
"""Heads narrower than this FlexAttention does not take."""


def uses_flex(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlexAttention computes what is more than causal.

    Args:
        backend: ``model.attention_backend``.
        width: of the narrowest of a query's, key's and value's head.
    """
    if backend == "auto":
        return device.type == "cuda" and dtype != torch.float64 and width >= LEAST_WIDTH
    return backend in ("flex", "fa4")


def build_visible(
    documents_BS: Tensor | None, window: int, shape: tuple[int, int], device: torch.device, *, flex: bool, sinks: bool
) -> Visible:
    """What queries see, made once for all layers alike; nothing is read from the device.

    Args:
        documents_BS: number of each token's document; None: a sequence is one.
        window: positions that a query sees; 0: all before it.
        shape: ``(B, S)``.
        flex: FlexAttention is to be used, should there be more than causal attention.
        sinks: there are sinks.
    """
    window = window if window < shape[1] else 0
    if documents_BS is None and not window and not (flex and sinks):
        return Visible(None, None)
    first_BS = first_visible(documents_BS, window, shape, device)
    return Visible(first_BS, build_blocks(first_BS) if flex else None)


def attend(
    q_BHSC: Tensor,
    k_BGSC: Tensor,
    v_BGSV: Tensor,
    visible: Visible,
    *,
    scale: float,
    sink_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``softmax(scale q k^T) v`` over the keys that each query sees, ``(B, H, S, V)``.

    Args:
        visible: of :func:`build_visible`.
        scale: of the scores.
        sink_H: a score of each head that joins the softmax and has no value (gpt-oss, arXiv:2508.10925).
        backend: ``model.attention_backend``.
    """
    if visible.blocks is not None:
        return _flex(q_BHSC, k_BGSC, v_BGSV, visible.blocks, scale, sink_H, backend)
    if visible.first_BS is None and sink_H is None:
        return F.scaled_dot_product_attention(
            q_BHSC, k_BGSC, v_BGSV, is_causal=True, scale=scale, enable_gqa=q_BHSC.shape[1] != k_BGSC.shape[1]
        )
    return plain_attention(q_BHSC, k_BGSC, v_BGSV, visible.first_BS, scale, sink_H)


def _flex(
    q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, blocks: Any, scale: float, sink_H: Tensor | None, backend: str
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    y_BHSV, aux = _flex_attention()(
        q_BHSC,
        k_BGSC,
        v_BGSV,
        block_mask=blocks,
        scale=scale,
        enable_gqa=q_BHSC.shape[1] != k_BGSC.shape[1],
        kernel_options={"BACKEND": "FLASH"} if backend == "fa4" else None,
        return_aux=AuxRequest(lse=sink_H is not None),
    )
    if sink_H is None:
        return y_BHSV
    # Of a softmax that a score s has joined, the rest keeps the share exp(lse) / (exp(lse) + exp(s)).
    share_BHS = torch.sigmoid(aux.lse - sink_H.to(aux.lse.dtype)[:, None])
    return (y_BHSV * share_BHS[..., None]).to(y_BHSV.dtype)


def _flex_attention() -> Any:
    """The operator, compiled by itself unless a block around it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()


@functools.cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
