"""What all blocks of a forward pass share: the rotation of each position, and which keys a query sees.

B sequences, S positions, H heads, C rotated width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dtensor.config.model import Rope
from moe_dtensor.config.resolve import block_window, head_widths
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.attention import Visible, build_visible, uses_flex


def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (j, j + C/2) of a head's first C dimensions by its angle; computed in at least float32.

    Args:
        x_BSHC: heads of width C or more; what is beyond stays as it is.
        cos: ``(B or 1, S, 1, C/2)``.
        sin: the same.
    """
    width = 2 * cos.shape[-1]
    if x_BSHC.shape[-1] > width:
        turned, rest = x_BSHC.split((width, x_BSHC.shape[-1] - width), dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)
    a, b = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BSHC.dtype)


def frequencies(dim: int, theta: float, rope: Rope, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians that each pair of dimensions turns from one position to the next, ``(C/2,)``.

    theta^(-2j/C) for j < C/2 (RoFormer, arXiv:2104.09864, eq. 15), scaled as ``rope`` says.

    Args:
        dim: C.
        length: of the sequences, by which longrope chooses its factors.
    """
    turn = theta ** -(torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
    match rope.scaling:
        case "linear":
            return turn / rope.factor
        case "llama3":
            return _interpolate(turn, rope.factor, _llama3_kept(turn, rope))
        case "yarn":
            return _interpolate(turn, rope.factor, _yarn_kept(turn, theta, rope))
        case "longrope":
            factors = rope.long_factors if length > rope.original_length else rope.short_factors
            return turn / turn.new_tensor(factors)
    return turn


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    if rope.attention_factor:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.scaling == "yarn":
        return 0.1 * math.log(rope.factor) + 1
    if rope.scaling == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    return 1.0


def _interpolate(turn: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Divided by ``factor``, but for the share that is kept."""
    return turn * kept + turn / factor * (1 - kept)


def _llama3_kept(turn: Tensor, rope: Rope) -> Tensor:
    """1 from ``high`` turns in the original length, 0 up to ``low``, linear in the turns between (Llama 3.1)."""
    turns = rope.original_length * turn / (2 * math.pi)
    return ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)


def _yarn_kept(turn: Tensor, theta: float, rope: Rope) -> Tensor:
    """1 from ``beta_fast`` turns in the original length, 0 up to ``beta_slow``, linear in the dimension between (YaRN,
    arXiv:2309.00071, section 3.2)."""
    dim = 2 * len(turn)
    fast, slow = (
        dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, dim - 1)
    # A ramp of no length would divide by zero.
    ramp = (torch.arange(len(turn), device=turn.device, dtype=turn.dtype) - fast) / max(slow - fast, 0.001)
    return 1 - ramp.clamp(0, 1)


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
