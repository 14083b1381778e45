"""These experts as an implementation that models of transformers 5 select by name.

    from moe_dtensor.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="moe_dtensor")

The model's weights stay as they are: ``gate_up_proj`` ``(E, 2F, D)``, gate before up, is ``w_up_EGFD`` seen flat, and
``down_proj`` ``(E, D, F)`` is ``w_down_EDF``. E experts held here, F expert hidden width, D width, T tokens, K choices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.kernels.experts.mlp import BACKENDS, expert_mlp

NAME = "moe_dtensor"

# Classes of transformers.activations (or torch.nn) by name, and what they are called here.
_GATED = {"SiLUActivation": "swiglu", "SiLU": "swiglu", "GELUActivation": "geglu"}
_PLAIN = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "ReLUSquaredActivation": "relu2"}


def register(name: str = NAME, backend: str = "auto") -> None:
    """Make ``experts_implementation=name`` known to transformers, for models made before and after.

    Args:
        name: what models ask for.
        backend: of :func:`moe_dtensor.kernels.experts.mlp.expert_mlp`.

    Raises:
        ImportError: transformers is not installed, or older than 5.
        ValueError: an unknown backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend = {backend!r} is not known. Use auto or one of {', '.join(BACKENDS)}.")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("This needs transformers 5 or newer: pip install 'transformers>=5'.") from error
    ALL_EXPERTS_FUNCTIONS.register(name, partial(experts_forward, backend=backend))


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """What transformers calls in place of an experts module's forward.

    Args:
        self: the module, with ``gate_up_proj`` (or ``up_proj`` if it has no gate), ``down_proj`` and ``act_fn``.
        hidden_states: ``(T, D)``.
        top_k_index: ``(T, K)``; ids that are not held here (expert parallelism gives E for them) count nothing.
        top_k_weights: ``(T, K)``.

    Returns:
        ``(T, D)``.

    Raises:
        ValueError: the module computes something that these kernels do not.
    """
    activation = _activation(self)
    up, groups = (self.gate_up_proj, 2) if self.has_gate else (self.up_proj, 1)
    return expert_mlp(
        hidden_states,
        up.unflatten(1, (groups, -1)),
        self.down_proj,
        top_k_weights,
        top_k_index.to(torch.int64),
        activation=activation,
        backend=backend,
    )


def _activation(experts: Any) -> str:
    """This package's name for what the module computes between its projections."""
    unlike = {
        "biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "gate and up interleaved": experts.has_gate and not experts.is_concatenated,
        "a norm after each expert": getattr(experts, "has_post_expert_norm", False),
        "a gate of its own": experts.has_gate and not _has_plain_gate(experts),
    }
    if found := [what for what, has in unlike.items() if has]:
        raise ValueError(_refusal(experts, f"it has {' and '.join(found)}"))
    known, act_fn = _GATED if experts.has_gate else _PLAIN, type(experts.act_fn).__name__
    if act_fn not in known:
        raise ValueError(_refusal(experts, f"its activation is {act_fn}, not one of {', '.join(known)}"))
    return known[act_fn]


def _has_plain_gate(experts: Any) -> bool:
    from transformers.integrations.moe import _default_apply_gate

    return type(experts)._apply_gate is _default_apply_gate


def _refusal(experts: Any, reason: str) -> str:
    return (
        f"experts_implementation = {NAME!r} does not compute {type(experts).__name__}: {reason}. "
        "Use experts_implementation = 'grouped_mm' or 'eager'."
    )
