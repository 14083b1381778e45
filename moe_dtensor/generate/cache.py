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

    def positions_BS(self, count: int) -> Tensor:
        """Position in its sequence of each of the next ``count`` slots; 0 before the first."""
        slot_S = torch.arange(self.filled, self.filled + count, device=self.first_B.device)
        return (slot_S - self.first_B[:, None]).clamp(min=0)

    def seen(self, count: int, window: int) -> Tensor:
        """Which slots each of the next ``count`` sees, ``(B, 1, S, N)`` up to the last of them.

        A slot before the first sees itself: a softmax over nothing is no number, and would spread.
        """
        stop, device = self.filled + count, self.first_B.device
        query_S1, key_N = torch.arange(self.filled, stop, device=device)[:, None], torch.arange(stop, device=device)
        seen_BSN = (key_N <= query_S1) & (key_N >= self.first_B[:, None, None])
        if window:
            seen_BSN = seen_BSN & (key_N > query_S1 - window)
        return (seen_BSN | (key_N == query_S1))[:, None]


class KeyValueCache:
    """In the place of ``attend`` in one attention layer: it remembers, and attends to all that it remembers.

    Args:
        slots: shared by all layers; who owns it moves ``filled`` on after each forward pass.
        window: slots that a query sees; 0: all.
    """

    def __init__(self, slots: Slots, window: int) -> None:
        self.slots, self.window = slots, window
        self.key_BGNC: Tensor | None = None
        self.value_BGNV: Tensor | None = None

    def __call__(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Visible, **how: Any) -> Tensor:
        """As :func:`moe_dtensor.kernels.attention.attend.attend`, over the slots filled so far and the new ones."""
        slots, count = self.slots, q_BHSC.shape[2]
        start, stop = slots.filled, slots.filled + count
        if self.key_BGNC is None or self.value_BGNV is None:
            self.key_BGNC, self.value_BGNV = (
                t.new_empty(*t.shape[:2], slots.total, t.shape[3]) for t in (k_BGSC, v_BGSV)
            )
        self.key_BGNC[:, :, start:stop], self.value_BGNV[:, :, start:stop] = k_BGSC, v_BGSV
        sink_H, scale = how.get("sink_H"), how["scale"]
        if start == 0 and slots.aligned and not (self.window and self.window < count):
            return attend(q_BHSC, k_BGSC, v_BGSV, Visible(None, None), scale=scale, sink_H=sink_H)
        # A single query's window is a slice: what is before it is not even read.
        begin = max(0, stop - self.window) if self.window and count == 1 else 0
        keys, values = self.key_BGNC[:, :, begin:stop], self.value_BGNV[:, :, begin:stop]
        plain = count == 1 and slots.aligned
        seen = None if plain else slots.seen(count, self.window)[..., begin:]
        return masked_attention(q_BHSC, keys, values, seen, scale, sink_H)
