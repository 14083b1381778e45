"""An expert in float8 as the oracle computes it: one token at a time, every number rounded by its exponent.

What a product reads is rounded to E4M3, forward and for the gradient of its input; a weight's gradient is the plain
one, of unrounded numbers. A vector has one scale, and so has an expert's whole weight.

D width, G up-projections, F hidden width; of any weight O numbers out and I in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0
"""Of E4M3; what is largest in a vector or a weight becomes it."""
LEAST = 1e-30
"""The largest number of a vector counts as this at least: zeros would have no scale."""
FRACTION, LOWEST = 3, -6
"""Bits after the point, and the lowest exponent; below it the step no longer shrinks."""


def e4m3(v: Tensor) -> Tensor:
    """The nearest number of E4M3, of two the one with an even fraction. ``v`` is between -448 and 448.

    Rounded once, in the precision of ``v``: ``v.to(torch.float8_e4m3fn)`` goes from float64 by way of float32, whose
    own rounding makes ties of what is none.
    """
    exponent = torch.frexp(v).exponent - 1
    step = torch.ldexp(torch.ones_like(v), exponent.clamp(min=LOWEST) - FRACTION)
    return (v / step).round() * step


def rounded(v: Tensor) -> Tensor:
    """``v`` as E4M3 holds it, with one scale for all its numbers; NaN throughout where one is not finite."""
    largest = v.abs().max().clamp(min=LEAST)
    return e4m3(v * (LARGEST / largest)) * (largest / LARGEST)


class _Product(torch.autograd.Function):
    """``gate * S(W) R(x)``; W itself is given for its gradient's sake."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, rounded_OI: Tensor, x_I: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(rounded_OI, x_I, gate)
        return gate * (rounded_OI @ rounded(x_I))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        (dy_O,), (rounded_OI, x_I, gate) = gradients, ctx.saved_tensors
        back_I = rounded_OI.T @ rounded(dy_O)
        return torch.outer(gate * dy_O, x_I), None, gate * back_I, back_I @ x_I


def product(weight_OI: Tensor) -> Callable[[Tensor, Tensor | float], Tensor]:
    """What takes a vector ``(I,)`` and a gate to ``(O,)``; the weight is rounded once."""
    rounded_OI = rounded(weight_OI.detach())

    def run(x_I: Tensor, gate: Tensor | float) -> Tensor:
        return _Product.apply(weight_OI, rounded_OI, x_I, torch.as_tensor(gate, dtype=x_I.dtype))

    return run


def expert(
    up_GFD: Tensor, down_DF: Tensor, activate: Callable[[Tensor, Tensor | None], Tensor]
) -> Callable[[Tensor, Tensor | float], Tensor]:
    """What takes a token ``(D,)`` and its gate, 1 where the token was multiplied by it, to ``(D,)``.

    Args:
        up_GFD: of one expert; before the last of its up-projections comes the one that gates it.
        down_DF: of the same.
        activate: of the last up-projection's ``(F,)`` and the first's, None where there is no first.
    """
    up, down = product(up_GFD.flatten(0, 1)), product(down_DF)

    def run(x_D: Tensor, gate: Tensor | float) -> Tensor:
        *first, last = up(x_D, 1.0).view(up_GFD.shape[:2])
        return down(activate(last, first[0] if first else None), gate)

    return run
