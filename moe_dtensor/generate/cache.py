"""Keys and values of the tokens so far. B sequences, S new positions, N slots, H query heads, G key and value heads.

Sequences of a batch end in the same slot: shorter prompts begin in a later one, and what is before their first is never
seen. So one slot more is one token more of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_dtensor.kernels.attention.attend import attend
from moe_dtensor.kernels.attention.plain import masked_attention
from moe_dtensor.kernels.attention.visible import Visible


class Slots:
    """How far all caches of a batch are filled, and where its sequences begin.

    Args:
        first_B: slot of the first token of each sequence.
        total: slots to make room for.
    """

    def __init__(self, first_B: Tensor, total: int) -> None:
        self.first_B, self.total, self.filled = first_B, total, 0
        self.aligned = not bool(first_B.any())
        """Whether all sequences begin in slot 0."""
        self.new_S = first_B.new_zeros(0)
        """The slots of the tokens that are read now, on the device: a step of one token has the same shapes wherever it
        stands, and reads nothing of the host."""
        self._seen: dict[int, Tensor] = {}

    def take(self, count: int) -> None:
        """Read ``count`` tokens now."""
        start = torch.full((1,), self.filled, device=self.first_B.device)
        self.new_S = start + torch.arange(count, device=self.first_B.device)
        self.filled += count
        self._seen.clear()

    def take_next(self) -> None:
        """Read one token now, from the slot after the last; the host's count is the caller's."""
        self.new_S.add_(1)
        self._seen.clear()

    @property
    def count(self) -> int:
        """Tokens that are read now."""
        return len(self.new_S)

    def positions_BS(self) -> Tensor:
        """Position in its sequence of each token that is read now; 0 before the first."""
        return (self.new_S - self.first_B[:, None]).clamp(min=0)

    def seen(self, window: int) -> Tensor:
        """Which of all slots each of these tokens sees, ``(B, 1, S, N)``; made once for all layers alike.

        A slot before the first sees itself: a softmax over nothing is no number, and would spread.
        """
        if window not in self._seen:
            query_S1, key_N = self.new_S[:, None], torch.arange(self.total, device=self.first_B.device)
            seen_BSN = (key_N <= query_S1) & (key_N >= self.first_B[:, None, None])
            if window:
                seen_BSN = seen_BSN & (key_N > query_S1 - window)
            self._seen[window] = (seen_BSN | (key_N == query_S1))[:, None]
        return self._seen[window]


class KeyValueCache:
    """In the place of ``attend`` in one attention layer: it remembers, and attends to all that it remembers.

    Args:
        slots: shared by all layers; who owns it says which are filled now.
        window: slots that a query sees; 0: all.
    """

    def __init__(self, slots: Slots, window: int) -> None:
        self.slots, self.window = slots, window
        self.key_BGNC: Tensor | None = None
        self.value_BGNV: Tensor | None = None

    def __call__(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Visible, **how: Any) -> Tensor:
        """As :func:`moe_dtensor.kernels.attention.attend.attend`, over the slots filled so far and the new ones."""
        slots = self.slots
        first = self.key_BGNC is None
        if self.key_BGNC is None or self.value_BGNV is None:
            # Zeros: what is not seen is multiplied by 0, and must be a number.
            self.key_BGNC, self.value_BGNV = (
                t.new_zeros(*t.shape[:2], slots.total, t.shape[3]) for t in (k_BGSC, v_BGSV)
            )
        self.key_BGNC.index_copy_(2, slots.new_S, k_BGSC)
        self.value_BGNV.index_copy_(2, slots.new_S, v_BGSV)
        sink_H, scale = how.get("sink_H"), how["scale"]
        if first and slots.aligned and not (self.window and self.window < slots.count):
            return attend(q_BHSC, k_BGSC, v_BGSV, Visible(None, None), scale=scale, sink_H=sink_H)
        seen = slots.seen(self.window)
        return masked_attention(q_BHSC, self.key_BGNC, self.value_BGNV, seen, scale, sink_H)
