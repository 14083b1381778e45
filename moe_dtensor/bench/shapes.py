"""Layers that ``bench layer`` times: their sizes, weights and inputs.

T tokens, D model width, F expert hidden width, E experts, K choices, G up-projections.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.mlp import expert_mlp
from moe_dtensor.kernels.router import router_logits, top_k_gates


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    activation: str

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward and backward: the experts' and the router's products."""
        return self.expert_flops + 6 * self.tokens * self.dim * self.experts

    @property
    def expert_flops(self) -> int:
        """Those of the experts' products."""
        return 6 * self.tokens * self.top_k * (num_up_projections(self.activation) + 1) * self.dim * self.hidden

    @property
    def kept_bytes(self) -> int:
        """What the expert MLP keeps for its backward in bf16, routing aside: its input and H."""
        copies = self.tokens * self.top_k
        return 2 * (self.tokens * self.dim + copies * num_up_projections(self.activation) * self.hidden)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 8192, 4096, 14336, 8, 2, "swiglu"),
        Shape("olmoe", 32768, 2048, 1024, 64, 8, "swiglu"),
        Shape("qwen3_30b", 32768, 2048, 768, 128, 8, "swiglu"),
        Shape("neox125m", 8192, 768, 3072, 8, 1, "gelu"),
        Shape("tiny", 512, 64, 96, 8, 2, "swiglu"),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of :data:`SHAPES`, or ``T,D,F,E,K,activation``. Raises ValueError for anything else."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) == 6 and all(part.isdigit() for part in parts[:5]):
        tokens, dim, hidden, experts, top_k = map(int, parts[:5])
        return Shape(text, tokens, dim, hidden, experts, top_k, parts[5])
    raise ValueError(f"--shapes {text!r} is not known. Use one of {', '.join(SHAPES)}, or T,D,F,E,K,activation.")


def moe_layer(
    x_TD: Tensor,
    w_router_ED: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    *,
    top_k: int,
    activation: str,
    backend: str,
    expert_TK: Tensor | None = None,
) -> Tensor:
    """Router, experts and combine: ``(T, D)`` in and out. ``expert_TK`` fixes the choice; gates are then its scores.
    ``float8`` as a backend is ``auto`` with ``moe.expert_dtype = float8``."""
    logits_TE = router_logits(x_TD, w_router_ED)
    if expert_TK is None:
        gate_TK, expert_TK = top_k_gates(logits_TE, top_k)
    else:
        gate_TK = logits_TE.softmax(1).gather(1, expert_TK)
    float8 = backend == "float8"
    arguments = (x_TD, w_up_EGFD, w_down_EDF, gate_TK, expert_TK)
    return expert_mlp(*arguments, activation=activation, backend="auto" if float8 else backend, float8=float8)


class Layer:
    """Weights, an input and an output gradient of one shape; calling it with a backend runs the layer.

    Args:
        shape: sizes.
        skew: see :func:`moe_dtensor.bench.layer.bench_layer`.
        device: of all tensors.
        dtype: of all tensors.
        compiled: run it by ``torch.compile``, as training does.
    """

    def __init__(self, shape: Shape, skew: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self.shape = shape
        if compiled:
            torch.compiler.reset()  # so that the sizes of another layer do not make this one's symbols
        self.forward = torch.compile(moe_layer, dynamic=False) if compiled else moe_layer
        generator = torch.Generator(device).manual_seed(1)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=generator, device=device, dtype=dtype)
            return values.mul_(std).requires_grad_()

        s, groups = shape, num_up_projections(shape.activation)
        self.x_TD = normal(s.tokens, s.dim)
        self.w_router_ED = nn.Parameter(normal(s.experts, s.dim, std=s.dim**-0.5))
        self.w_up_EGFD = nn.Parameter(normal(s.experts, groups, s.hidden, s.dim, std=s.dim**-0.5))
        self.w_down_EDF = nn.Parameter(normal(s.experts, s.dim, s.hidden, std=s.hidden**-0.5))
        self.dy_TD = normal(s.tokens, s.dim).detach()
        if skew == "zipf":
            # A feature that is 1 for every token makes its router column a bias: odds of expert e go as 1 / (e + 1).
            with torch.no_grad():
                self.x_TD[:, 0] = 1
                self.w_router_ED[:, 0] = -torch.arange(1, s.experts + 1, device=device).log()

    def as_float32(self) -> Layer:
        """The same layer, not compiled, its weights and input as float32 leaves of their own."""
        other = copy.copy(self)
        other.forward = moe_layer
        for name in ("x_TD", "w_router_ED", "w_up_EGFD", "w_down_EDF"):
            setattr(other, name, getattr(self, name).detach().float().requires_grad_())
        return other

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {"x": self.x_TD, "router": self.w_router_ED, "w_up": self.w_up_EGFD, "w_down": self.w_down_EDF}

    def choose(self) -> Tensor:
        """The experts of each token, ``(T, K)``."""
        return top_k_gates(router_logits(self.x_TD, self.w_router_ED), self.shape.top_k)[1]

    def __call__(self, backend: str, expert_TK: Tensor | None = None, x_TD: Tensor | None = None) -> Tensor:
        """The layer's output ``(T, D)``, of another input if one is given."""
        leaves = self.leaves if x_TD is None else self.leaves | {"x": x_TD}
        return self.forward(
            *leaves.values(),
            top_k=self.shape.top_k,
            activation=self.shape.activation,
            backend=backend,
            expert_TK=expert_TK,
        )

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def step(self, backend: str) -> None:
        """Forward and backward, without old gradients."""
        self.clear()
        self(backend).backward(self.dy_TD)
