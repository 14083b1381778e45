"""Grouped-query causal attention. B sequences, S positions, D width, H query heads, C head width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dtensor.config.schema import Config
from moe_dtensor.layers.norm import HeadsNorm


class Attention(nn.Module):
    """Causal attention with rotary positions (RoFormer, arXiv:2104.09864) and grouped keys and
    values (GQA, arXiv:2305.13245).

    How many heads it has is read off its weights, so a part of the heads is computed by the same code.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.head_dim = model.head_dim
        self.rope_theta = model.rope_theta
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.wq = nn.Linear(model.dim, width, bias=False)
        self.wk = nn.Linear(model.dim, kv_width, bias=False)
        self.wv = nn.Linear(model.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, model.dim, bias=False)
        self.qk_norm = model.qk_norm
        if model.qk_norm == "head":
            self.q_norm: nn.Module = nn.RMSNorm(model.head_dim, eps=model.norm_eps)
            self.k_norm: nn.Module = nn.RMSNorm(model.head_dim, eps=model.norm_eps)
        elif model.qk_norm == "full":
            self.q_norm = HeadsNorm(width, model.norm_eps)
            self.k_norm = HeadsNorm(kv_width, model.norm_eps)

    def forward(self, x_BSD: Tensor, positions_BS: Tensor | None, documents_BS: Tensor | None) -> Tensor:
        """Attend to earlier positions of the same sequence (and document).

        Args:
            x_BSD: normalised residual stream.
            positions_BS: position of each token for the rotation; None: 0, 1, … S-1.
            documents_BS: document of each token; None: the whole sequence is one.

        Returns:
            ``(B, S, D)``.
        """
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope_table(x_BSD, positions_BS, self.head_dim, self.rope_theta)
        q_BHSC, k_BHSC = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v_BHSC = v.transpose(1, 2)
        mask = None
        if documents_BS is not None:
            same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
            mask = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
        grouped = q_BHSC.shape[1] != k_BHSC.shape[1]
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BHSC, v_BHSC, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return self.wo(y_BHSC.transpose(1, 2).flatten(2))


def rope_table(x_BSD: Tensor, positions_BS: Tensor | None, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x theta^(-2j/C) for j < C/2, each ``(B or 1, S, 1, C/2)``, at least float32."""
    dtype = torch.promote_types(x_BSD.dtype, torch.float32)
    if positions_BS is None:
        positions_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
    exponent = torch.arange(0, head_dim, 2, device=x_BSD.device, dtype=dtype) / head_dim
    angle = positions_BS.to(dtype)[..., None] * theta**-exponent
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (j, j + C/2) of a head by its angle; computed in the dtype of ``cos``."""
    a, b = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BSHC.dtype)
