"""In the place of FlashAttention 4: functions with its names, arguments and results, in plain PyTorch."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor


class FlashPackage:
    """What the package is asked for, and how often."""

    def __init__(self) -> None:
        self.forwards, self.backwards = 0, 0
        self.deterministic = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As ``flash_attn.cute.interface``."""
        names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
        package, cute, interface = (ModuleType(name) for name in names)
        vars(interface).update(_flash_attn_fwd=self.forward, _flash_attn_bwd=self.backward)
        vars(package)["cute"], vars(cute)["interface"] = cute, interface
        for module in (package, cute, interface):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_lse: bool
    ) -> tuple[Tensor, Tensor, None, None, None]:
        """``(B, S, H, V)`` and ``(B, H, S)`` in float32; and three that are for other kinds of attention."""
        assert causal
        assert return_lse
        self.forwards += 1
        assert k.shape[:2] == v.shape[:2] == q.shape[:2]
        weight_BHST, lse_BHS = _softmax(q, k, softmax_scale)
        v_BSHV = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        y_BSHV = torch.einsum("bhst,bthv->bshv", weight_BHST, v_BSHV.to(weight_BHST.dtype))
        return y_BSHV.to(q.dtype).contiguous(), lse_BHS.float().contiguous(), None, None, None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the gradients where it is told to."""
        assert causal
        self.backwards += 1
        self.deterministic = deterministic
        # Operators run beneath autograd, so that this is by hand.
        weight_BHST, expected = _softmax(q, k, softmax_scale)
        torch.testing.assert_close(lse, expected.float())
        wide, shared = weight_BHST.dtype, q.shape[2] // k.shape[2]
        k_BSHC, v_BSHV = (t.repeat_interleave(shared, dim=2).to(wide) for t in (k, v))
        dweight = torch.einsum("bshv,bthv->bhst", dout.to(wide), v_BSHV)
        seen = (dout.to(wide) * out.to(wide)).sum(-1).mT[..., None]
        dscores = weight_BHST * (dweight - seen) * softmax_scale
        dq.copy_(torch.einsum("bhst,bthc->bshc", dscores, k_BSHC))
        dk_BSHC = torch.einsum("bhst,bshc->bthc", dscores, q.to(wide))
        dv_BSHV = torch.einsum("bhst,bshv->bthv", weight_BHST, dout.to(wide))
        dk.copy_(dk_BSHC.unflatten(2, (-1, shared)).sum(3))
        dv.copy_(dv_BSHV.unflatten(2, (-1, shared)).sum(3))
        return dq, dk, dv


def _softmax(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, S, S)``, and the logarithm of each one's sum ``(B, H, S)``, in at least float32."""
    wide, length = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    # Of query heads that share keys, those that lie side by side do.
    k_BSHC = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bshc,bthc->bhst", q.to(wide), k_BSHC.to(wide)) * scale
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)
