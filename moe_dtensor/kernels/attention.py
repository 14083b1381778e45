"""Attention over the keys that a query sees (causal, inside a document, inside a window, with sinks): which keys those
are, and the ways to compute it.

Documents lie one after the other and a window moves along, so what a query sees is always a run of keys that ends at
its own position: a number for each query says it all, and no (S, S) mask is made.

Plain causal attention is ``scaled_dot_product_attention``, which picks the fastest that torch has, or by name
FlashAttention 4 (:mod:`.flash`). Documents, windows and sinks are FlexAttention's on a GPU, which skips the blocks of
keys that no query of a block sees; else a mask.

B sequences, S positions, R blocks of 128 positions, H query heads, G key and value heads, C width of a query or key, V
of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dtensor.kernels.flash import flash_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


BLOCK = 128


class Visible(NamedTuple):
    """Of one kind of layer, in one forward pass."""

    first_BS: Tensor | None
    """Position of the first key that each query sees, int32, ``(B, S)``; the last is its own. None: 0."""
    blocks: BlockMask | None
    """The same for FlexAttention; None: not to be used."""


def first_visible(documents_BS: Tensor | None, window: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The first key that each query sees, int32 ``(B, S)``.

    Args:
        documents_BS: number of each token's document; None: a sequence is one.
        window: positions that a query sees, its own included; 0: all before it.
        shape: ``(B, S)``.
    """
    at_BS = torch.arange(shape[1], device=device).expand(shape)
    first_BS = torch.zeros_like(at_BS)
    if documents_BS is not None:
        starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        first_BS = at_BS.where(starts_BS, 0).cummax(dim=1).values
    if window:
        first_BS = first_BS.maximum(at_BS - (window - 1))
    return first_BS.to(torch.int32)


def build_blocks(first_BS: Tensor) -> BlockMask:
    """FlexAttention's mask, without asking the device anything and in sizes that depend on S alone.

    ``first_BS`` never falls along a sequence, so the keys that a block of queries sees are a run of blocks. Those that
    all of its queries see whole need no mask inside.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = first_BS.shape[1]
    block_R = torch.arange(-(-length // BLOCK), device=first_BS.device)
    first_BR = first_BS[:, ::BLOCK, None] // BLOCK
    last_BR = first_BS[:, (block_R * BLOCK + BLOCK - 1).clamp(max=length - 1), None]
    before = block_R < block_R[:, None]
    whole = before & (block_R * BLOCK >= last_BR)
    partial = (
        (before | torch.eye(len(block_R), dtype=torch.bool, device=block_R.device)) & (block_R >= first_BR) & ~whole
    )

    def sees(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_BS[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(chosen_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, ``(B, 1, R)``, and a list of all that begins with
    them, ``(B, 1, R, R)``."""
    chosen = chosen_BRR[:, None].to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


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
        if backend == "fa4":
            q_BSHC, k_BSGC, v_BSGV = (t.transpose(1, 2) for t in (q_BHSC, k_BGSC, v_BGSV))
            return flash_attention(q_BSHC, k_BSGC, v_BSGV, scale).transpose(1, 2)
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


def plain_attention(
    q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, first_BS: Tensor | None, scale: float, sink_H: Tensor | None
) -> Tensor:
    """``softmax(scale q k^T) v`` over the keys that a query sees, ``(B, H, S, V)``.

    Args:
        first_BS: the first key that each query sees; None: 0.
        sink_H: a score of each head that joins the softmax and has no value; None: there is none.
    """
    length = q_BHSC.shape[2]
    at_S = torch.arange(length, device=q_BHSC.device)
    seen = at_S <= at_S[:, None]
    if first_BS is not None:
        seen = (seen & (at_S >= first_BS[..., None]))[:, None]
    return masked_attention(q_BHSC, k_BGSC, v_BGSV, seen, scale, sink_H)


def masked_attention(
    q_BHSC: Tensor, k_BGNC: Tensor, v_BGNV: Tensor, seen: Tensor | None, scale: float, sink_H: Tensor | None
) -> Tensor:
    """The same for any number N of keys.

    Args:
        seen: which keys each query sees, of a shape that goes with ``(B, H, S, N)``; None: all.
    """
    if sink_H is None:
        return F.scaled_dot_product_attention(
            q_BHSC, k_BGNC, v_BGNV, attn_mask=seen, scale=scale, enable_gqa=q_BHSC.shape[1] != k_BGNC.shape[1]
        )
    k_BHNC, v_BHNV = (t.repeat_interleave(q_BHSC.shape[1] // t.shape[1], dim=1) for t in (k_BGNC, v_BGNV))
    wide = torch.promote_types(q_BHSC.dtype, torch.float32)
    score_BHSN = (q_BHSC @ k_BHNC.mT).to(wide) * scale
    if seen is not None:
        score_BHSN = score_BHSN.masked_fill(~seen, -torch.inf)
    sink = sink_H.to(wide)[:, None, None].expand(*score_BHSN.shape[:3], 1)
    weight = torch.cat((score_BHSN, sink), dim=-1).softmax(-1)[..., :-1]
    return weight.to(v_BHNV.dtype) @ v_BHNV
