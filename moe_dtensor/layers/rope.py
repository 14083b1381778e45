"""The rotary position embedding, and the scaling of its frequencies for long contexts.

B sequences, S positions, H heads, C rotated width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_dtensor.config.model import Rope


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
