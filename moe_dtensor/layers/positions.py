"""What all blocks of a forward pass share: the rotation of each position, and which keys a query sees.

B sequences, S positions, C rotated width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dtensor.config.resolve import block_window, head_widths
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.attention.attend import build_visible, uses_flex
from moe_dtensor.kernels.attention.visible import Visible
from moe_dtensor.layers.rope import attention_factor, frequencies


class Place(NamedTuple):
    """What one kind of block knows of positions."""

    cos: Tensor
    """``(B or 1, S, 1, C/2)``, at least float32."""
    sin: Tensor
    """The same."""
    visible: Visible


class Positions(NamedTuple):
    """Made once for a forward pass, used by every attention layer in it."""

    full: Place
    """Of blocks without a window."""
    window: Place
    """Of blocks with one."""


def build_positions(
    config: Config,
    layers: Iterable[int],
    shape: tuple[int, int],
    positions_BS: Tensor | None,
    documents_BS: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Positions:
    """Angles position x frequency, and what queries see, for the kinds of block that are among ``layers``.

    Args:
        config: resolved.
        shape: ``(B, S)``.
        positions_BS: position of each token; None: 0, 1, … S-1 in every sequence.
        documents_BS: document of each token; None: a sequence is one document.
        dtype: of the stream; angles are computed in at least float32.
    """
    model = config.model
    flex = uses_flex(model.attention_backend, min(head_widths(config)[:2]), dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    if positions_BS is None:
        positions_BS = torch.arange(shape[1], device=device)[None]

    def place(window: int) -> Place:
        cos, sin = rotation(config, window > 0, positions_BS, shape[1], wide)
        return Place(cos, sin, build_visible(documents_BS, window, shape, device, flex=flex, sinks=model.sinks))

    places = {window: place(window) for window in {block_window(config, layer) for layer in layers}}
    any_place = next(iter(places.values()))
    return Positions(places.get(0, any_place), places.get(model.window, any_place))


def rotation(
    config: Config, has_window: bool, positions_BS: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of one kind of block, as :class:`Place` has them.

    Args:
        length: of the sequences, by which longrope chooses its factors.
        dtype: at least float32.
    """
    model, rope, theta = config.model, config.rope, config.model.rope_theta
    if has_window:
        rope, theta = rope if rope.scale_windows else type(rope)(), model.window_theta or theta
    turn = frequencies(head_widths(config).rotated, theta, rope, length, dtype, positions_BS.device)
    angle, factor = positions_BS.to(dtype)[..., None, None] * turn, attention_factor(rope)
    return angle.cos() * factor, angle.sin() * factor
