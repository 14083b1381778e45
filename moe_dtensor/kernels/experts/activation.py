"""Activations of feed-forwards and experts, by name.

G is 2 for gated activations (index 0 is the gate, 1 the up-projection) and 1 for plain ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)^2``, the squared ReLU of Primer (So et al., 2021)."""
    return F.relu(x).square()


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu2": relu2}


def swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    """``g sigmoid(1.702 g) (u + 1)`` with g = min(gate, 7) and u = up clamped to -7 .. 7: that of gpt-oss."""
    gate = gate.clamp(max=7)
    return gate * (1.702 * gate).sigmoid() * (up.clamp(-7, 7) + 1)


_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "swiglu_clamped": swiglu_clamped,
}

ACTIVATIONS = (*_GATED, *_PLAIN)


def num_up_projections(activation: str) -> int:
    """G: 2 for swiglu, geglu and swiglu_clamped, 1 for gelu, silu and relu2. Raises ValueError for any other name."""
    if activation in _GATED:
        return 2
    if activation in _PLAIN:
        return 1
    raise ValueError(f"activation = {activation!r} is not known. Use one of {', '.join(ACTIVATIONS)}.")


def activate(h_GF: Tensor, activation: str) -> Tensor:
    """Apply an activation to the up-projections' outputs.

    Args:
        h_GF: ``(..., G, F)``; for gated activations ``[..., 0, :]`` is the gate, ``[..., 1, :]`` the up-projection.
        activation: swiglu ``silu(gate) * up``, geglu ``gelu(gate) * up`` (erf form), swiglu_clamped
            (:func:`swiglu_clamped`), gelu, silu or relu2.

    Returns:
        ``(..., F)`` in the dtype of ``h_GF``.
    """
    groups = num_up_projections(activation)
    if h_GF.shape[-2] != groups:
        raise ValueError(f"{activation} takes (..., {groups}, F), not {tuple(h_GF.shape)}.")
    if groups == 2:
        return _GATED[activation](h_GF[..., 0, :], h_GF[..., 1, :])
    return _PLAIN[activation](h_GF[..., 0, :])


def activate_pair(gate_F: Tensor, up_F: Tensor, activation: str) -> Tensor:
    """A gated activation of two separate tensors of one shape."""
    return _GATED[activation](gate_F, up_F)


# Written out: operators may run where autograd is off, as they do under a dispatch mode (torch's FlopCounterMode).
_PLAIN_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "silu": torch.ops.aten.silu_backward.default,
    "relu2": lambda da, x: 2 * F.relu(x) * da,
}


def _swiglu_clamped_gradient(da: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    low, bounded = gate.clamp(max=7), up.clamp(-7, 7) + 1
    share = (1.702 * low).sigmoid()
    slope = share * (1 + 1.702 * low * (1 - share))
    return da * bounded * slope * (gate <= 7), da * low * share * (up.abs() <= 7)


_GATED_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "swiglu": lambda da, gate, up: (_PLAIN_GRADIENTS["silu"](da * up, gate), da * F.silu(gate)),
    "geglu": lambda da, gate, up: (_PLAIN_GRADIENTS["gelu"](da * up, gate), da * F.gelu(gate)),
    "swiglu_clamped": _swiglu_clamped_gradient,
}


def activation_gradient(h_GF: Tensor, da_F: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation's value and the gradient of its input, recomputed from the input.

    Args:
        h_GF: ``(..., G, F)``, what :func:`activate` was given.
        da_F: ``(..., F)``, gradient of the activation's output.

    Returns:
        ``(a_F, dh_GF)``: the output and the gradient of ``h_GF``.
    """
    if num_up_projections(activation) == 1:
        x = h_GF[..., 0, :]
        return _PLAIN[activation](x), _PLAIN_GRADIENTS[activation](da_F, x)[..., None, :]
    gate, up = h_GF[..., 0, :], h_GF[..., 1, :]
    return _GATED[activation](gate, up), torch.stack(_GATED_GRADIENTS[activation](da_F, gate, up), -2)
