"""Attention written out: for any device and dtype, and what faster ways are compared with.

B sequences, S positions, H query heads, G key and value heads, C width of a query or key, V of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
