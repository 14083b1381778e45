"""What attention keeps of the tokens so far. B sequences, S positions, N kept, H query heads, G key and value heads.

Sequences of a batch end in the same slot: shorter prompts begin in a later one, and what is before their first is never
seen. So one slot more is one token more of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_dtensor.kernels.attention import Visible, attend, masked_attention


class Slots:
    """The slots that are read now, of all caches of a batch: first the prompts, then one slot after the other.

    Args:
        first_B: slot of the first token of each sequence.
        total: slots in all.
    """

    def __init__(self, first_B: Tensor, total: int) -> None:
        self.first_B, self.total = first_B, total
        self.aligned = not bool(first_B.any())
        """Whether all sequences begin in slot 0."""
        self.is_prompt = True
        self.new_S = first_B.new_zeros(0)
        """The slots of the tokens that are read now, on the device: a step of one token has the same shapes wherever it
        stands, and reads nothing of the host."""
        self._seen: dict[int, Tensor] = {}

    def take_prompts(self, count: int) -> None:
        """Read ``count`` tokens of each sequence, the first ones."""
        self.new_S = torch.arange(count, device=self.first_B.device)

    def end_prompts(self) -> None:
        """From now on :meth:`take_next`."""
        self.new_S, self.is_prompt = self.new_S[-1:].clone(), False
        self._seen.clear()

    def take_next(self) -> None:
        """Read one token, from the slot after the last."""
        self.new_S.add_(1)
        self._seen.clear()

    def positions_BS(self) -> Tensor:
        """Position in its sequence of each token that is read now; 0 before the first."""
        return (self.new_S - self.first_B[:, None]).clamp(min=0)

    def rows(self, window: int) -> int:
        """Slots that a cache has room for: later ones take the place of those that no query sees any more."""
        return min(window, self.total) if window else self.total

    def seen(self, window: int) -> Tensor:
        """Which keys each of these tokens sees, ``(B, 1, S, N)``: of the prompts' own, later of the cache's rows. Made
        once for all layers alike.

        A slot before the first sees itself: a softmax over nothing is no number, and would spread.
        """
        if window not in self._seen:
            query_S1 = self.new_S[:, None]
            key_N = self.new_S if self.is_prompt else self._held(self.rows(window))
            seen_BSN = (key_N <= query_S1) & (key_N >= self.first_B[:, None, None])
            if window:
                seen_BSN = seen_BSN & (key_N > query_S1 - window)
            self._seen[window] = (seen_BSN | (key_N == query_S1))[:, None]
        return self._seen[window]

    def _held(self, rows: int) -> Tensor:
        """The slot in each row of a cache; below 0 where there is none yet."""
        row_N = torch.arange(rows, device=self.first_B.device)
        return self.new_S - (self.new_S - row_N) % rows


class Cache:
    """What one layer keeps of each slot.

    Args:
        slots: shared by all layers; who owns it says which are read now.
        window: slots that a query sees, and so the rows there are; 0: all.
    """

    def __init__(self, slots: Slots, window: int) -> None:
        self.slots, self.window = slots, window
        self.held: list[Tensor] = []
        """``(B, G, N, width)`` each."""

    def keep(self, *new_BGSW: Tensor) -> None:
        """Remember this of the tokens that are read now; always of the same widths."""
        rows = self.slots.rows(self.window)
        if not self.held:
            # Zeros: what is not seen is multiplied by 0, and must be a number.
            self.held = [t.new_zeros(*t.shape[:2], rows, t.shape[3]) for t in new_BGSW]
        last_S = self.slots.new_S[-rows:] % rows
        for held, new in zip(self.held, new_BGSW, strict=True):
            held.index_copy_(2, last_S, new[:, :, -rows:])

    def attend_prompts(
        self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, scale: float, sink_H: Tensor | None
    ) -> Tensor:
        """Of prompts, which see nothing but themselves."""
        slots = self.slots
        if slots.aligned and not 0 < self.window < len(slots.new_S):
            return attend(q_BHSC, k_BGSC, v_BGSV, Visible(None, None), scale=scale, sink_H=sink_H)
        return masked_attention(q_BHSC, k_BGSC, v_BGSV, slots.seen(self.window), scale, sink_H)


class KeyValueCache(Cache):
    """In the place of ``attend`` in one attention layer: it remembers keys and values, and attends to all that it
    remembers."""

    def __call__(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Visible, **how: Any) -> Tensor:
        """As :func:`moe_dtensor.kernels.attention.attend`, over the slots before and the new ones."""
        self.keep(k_BGSC, v_BGSV)
        scale, sink_H = how["scale"], how.get("sink_H")
        if self.slots.is_prompt:
            return self.attend_prompts(q_BHSC, k_BGSC, v_BGSV, scale, sink_H)
        key_BGNC, value_BGNV = self.held
        return masked_attention(q_BHSC, key_BGNC, value_BGNV, self.slots.seen(self.window), scale, sink_H)


class LatentCache(Cache):
    """The same for latent attention, which gives its latents to :meth:`recall`: no key or value of a head is kept."""

    def recall(self, new_B1SW: Tensor) -> tuple[Tensor, Tensor] | None:
        """All that is held with the new, ``(B, 1, N, W)``, and what a query sees of it; None: there is only the new."""
        self.keep(new_B1SW)
        return None if self.slots.is_prompt else (self.held[0], self.slots.seen(self.window))

    def __call__(self, q_BHSC: Tensor, k_BHSC: Tensor, v_BHSV: Tensor, visible: Visible, **how: Any) -> Tensor:
        """As :func:`moe_dtensor.kernels.attention.attend`, of prompts alone."""
        return self.attend_prompts(q_BHSC, k_BHSC, v_BHSV, how["scale"], how.get("sink_H"))
