"""Expert layers for tests, and the comparison of a backend with the reference. Letters as in moe_dtensor.kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.mlp import expert_mlp


@dataclass(frozen=True)
class Case:
    T: int
    D: int
    F: int
    E: int
    K: int
    activation: str
    first_expert: int = 0
    held: int | None = None
    rows: str | int = "exact"
    absent: int = 0
    """Every so many-th choice has the id -1, and NaN for a gate."""
    split: bool = False
    """Weight gradients as autograd nodes of their own."""
    bias: bool = False
    """Experts' biases of the up-projections."""
    keep: bool = False
    """The rows of tokens are kept for the backward pass."""
    float8: bool = False
    """Products of rows in float8."""

    @property
    def num_held(self) -> int:
        return self.E if self.held is None else self.held


ODD_CASES = [
    Case(37, 16, 24, 5, 2, "swiglu"),
    Case(37, 24, 8, 5, 1, "gelu"),
    Case(5, 24, 16, 40, 3, "geglu"),  # most experts have no token
    Case(64, 40, 24, 6, 4, "relu2", first_expert=2, held=3),
    Case(64, 40, 24, 6, 4, "silu", first_expert=2, held=3, rows="worst"),
    Case(0, 16, 16, 4, 2, "swiglu"),
    Case(9, 8, 8, 4, 4, "swiglu", held=1),
    Case(1, 8, 8, 64, 32, "swiglu"),
    Case(140, 8, 8, 1, 1, "gelu"),  # one expert, more rows than a tile
    Case(37, 16, 24, 5, 2, "swiglu", absent=3),
    Case(37, 16, 24, 5, 5, "geglu", absent=2, first_expert=1, held=3),
    Case(37, 24, 8, 5, 1, "gelu", absent=2, first_expert=1, held=3, rows="worst"),
    Case(9, 8, 8, 4, 2, "silu", absent=1),  # no choice at all
    Case(37, 16, 24, 5, 3, "swiglu", absent=2, rows=60),  # fewer rows than T * K, more than copies
    Case(37, 16, 24, 5, 1, "swiglu", first_expert=1, held=2, rows=37),
    Case(37, 16, 24, 5, 3, "gelu", absent=1, rows=0),
    Case(37, 16, 24, 5, 2, "swiglu", split=True),
    Case(64, 40, 24, 6, 4, "gelu", first_expert=2, held=3, absent=3, split=True),
    Case(37, 16, 24, 5, 2, "swiglu", first_expert=1, held=3, rows="worst", keep=True),
    Case(37, 16, 24, 5, 2, "swiglu", absent=3, split=True, keep=True),
    Case(37, 16, 24, 5, 2, "swiglu_clamped"),
    Case(37, 16, 24, 5, 2, "swiglu_clamped", bias=True, absent=3),
    Case(64, 40, 24, 6, 4, "gelu", first_expert=2, held=3, rows="worst", bias=True, split=True),
    Case(0, 16, 16, 4, 2, "swiglu", bias=True),
]

FLOAT8_CASES = [
    Case(90, 96, 80, 5, 2, "swiglu", float8=True),
    Case(37, 16, 48, 5, 1, "gelu", float8=True),
    Case(5, 32, 16, 40, 3, "geglu", float8=True),
    Case(64, 48, 32, 6, 4, "relu2", first_expert=2, held=3, rows="worst", float8=True),
    Case(0, 16, 16, 4, 2, "swiglu", float8=True),
    Case(9, 16, 16, 4, 2, "silu", absent=1, float8=True),
    Case(37, 16, 32, 5, 3, "swiglu", absent=2, rows=60, keep=True, float8=True),
    Case(140, 272, 16, 1, 1, "swiglu_clamped", float8=True),
]


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """``[x, w_up, w_down, gate]``, and the biases if any, as leaves, expert ids, and a gradient for the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    groups = num_up_projections(case.activation)
    tensors = [
        normal(case.T, case.D),
        normal(case.num_held, groups, case.F, case.D) / case.D**0.5,
        normal(case.num_held, case.D, case.F) / case.F**0.5,
    ]
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    leaves.append(normal(case.T, case.K).abs().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_())
    # Activations on both sides of their clamps.
    if case.activation == "swiglu_clamped":
        leaves[1].data *= 5
    bias = normal(case.num_held, groups, case.F)
    order = torch.rand(case.T, case.E, generator=generator).argsort(1)
    expert_TK = order[:, : case.K].contiguous()
    if case.absent:
        expert_TK.view(-1)[:: case.absent] = -1
        leaves[3].data.view(-1)[:: case.absent] = torch.nan
    if case.bias:
        leaves.append(bias.to(device, dtype).requires_grad_())
    return leaves, expert_TK.to(device), normal(case.T, case.D).to(device, dtype)


def run(case: Case, backend: str, leaves: list[Tensor], expert_TK: Tensor) -> Tensor:
    return expert_mlp(
        *leaves[:4],
        expert_TK,
        activation=case.activation,
        backend=backend,
        first_expert=case.first_expert,
        rows=case.rows,
        num_experts=case.E,
        split_backward=case.split,
        up_bias_EGF=leaves[4] if case.bias else None,
        keep_rows=case.keep,
        float8=case.float8,
    )


def relative_errors(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Errors of the output and of every gradient against the reference in float64 on the same values."""
    leaves, expert_TK, dy_TD = make_inputs(case, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_TD = run(case, "reference", wide, expert_TK)
    expected_TD.backward(dy_TD.double())
    y_TD = run(case, backend, leaves, expert_TK)
    y_TD.backward(dy_TD)
    got = [y_TD, *(leaf.grad for leaf in leaves)]
    expected = [expected_TD, *(leaf.grad for leaf in wide)]
    names = ("y", "x", "w_up", "w_down", "gate", "up_bias")[: len(got)]
    # Where nothing is expected (no token), nothing may come: the error is then absolute.
    errors = {
        name: ((a.double() - b).norm() / (b.norm() if b.norm() > 0 else 1)).item()
        for name, a, b in zip(names, got, expected, strict=True)
    }
    # The largest of several numbers need not be NaN where one of them is.
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
