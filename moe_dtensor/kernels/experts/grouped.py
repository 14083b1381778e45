"""Grouped GEMMs: rows sorted by expert times each expert's weight, and the weights' gradients, by backend.

A backend is a module with three functions: ``tiles`` (what it precomputes from the rows' ends), ``rows_times_weight``
and ``weight_gradient``. P and Q are a weight's two sides, ``w_EPQ``.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from moe_dtensor.kernels.library import define, launches_triton

_MODULES = {"torch": "grouped_torch", "triton": "grouped_triton", "grouped_gemm": "grouped_package"}


_DTYPES = {
    "torch": (torch.bfloat16, torch.float16, torch.float32),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "grouped_gemm": (torch.bfloat16,),
}


def check(backend: str, x_TD: Tensor, hidden: int) -> None:
    """Raise ValueError for a dtype, device or size (D, F) that a backend does not take."""
    remedy = "set moe.backend = reference"
    if x_TD.dtype not in _DTYPES[backend]:
        raise ValueError(f"moe.backend = {backend} does not take {x_TD.dtype}: {remedy}.")
    if backend == "grouped_gemm" and not x_TD.is_cuda:
        raise ValueError(f"moe.backend = grouped_gemm runs on CUDA, not on {x_TD.device.type}: {remedy}.")
    if backend == "triton" and not launches_triton(x_TD):
        raise ValueError(f"moe.backend = triton runs on CUDA, not on {x_TD.device.type}: {remedy}.")
    # The hardware's bulk loads take rows that start at multiples of 16 bytes.
    step, width = 16 // x_TD.dtype.itemsize, x_TD.shape[1]
    if width % step or hidden % step:
        raise ValueError(
            f"moe.backend = {backend} needs model.dim and moe.hidden_dim to be multiples of {step} in {x_TD.dtype} "
            f"(16 bytes), but they are {width} and {hidden}: round them up, or {remedy}."
        )


@cache
def backend_module(backend: str) -> ModuleType:
    """The module of a grouped-GEMM backend; what it needs is imported here, on first use."""
    return importlib.import_module(f"{__package__}.{_MODULES[backend]}")


def _make_tiles(ends_E: Tensor, rows: int, backend: str) -> Tensor:
    return backend_module(backend).make_tiles(ends_E, rows)


make_tiles = define(
    "make_tiles(Tensor ends, SymInt rows, str backend) -> Tensor",
    _make_tiles,
    lambda ends_E, rows, backend: backend_module(backend).fake_tiles(ends_E, rows),
)
"""What a backend's GEMMs share: the tile table of ``triton``, the host's counts of ``grouped_gemm``, else nothing."""


def _rows_times_weight(
    a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool, backend: str
) -> Tensor:
    if a_N.shape[0] == 0:
        return _fake_rows_times_weight(a_N, w_EPQ, ends_E, tiles, transposed, backend)
    return backend_module(backend).rows_times_weight(a_N.contiguous(), w_EPQ.contiguous(), ends_E, tiles, transposed)


def _fake_rows_times_weight(
    a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool, backend: str
) -> Tensor:
    return a_N.new_empty(a_N.shape[0], w_EPQ.shape[1 if transposed else 2])


rows_times_weight = define(
    "rows_times_weight(Tensor a, Tensor w, Tensor ends, Tensor tiles, bool transposed, str backend) -> Tensor",
    _rows_times_weight,
    _fake_rows_times_weight,
)
"""``out[n] = w[e(n)] @ a[n]`` if transposed (``(N, Q) -> (N, P)``), else ``a[n] @ w[e(n)]`` (``(N, P) -> (N, Q)``)."""


def _weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor, backend: str) -> Tensor:
    if l_NP.shape[0] == 0:
        return l_NP.new_zeros(ends_E.numel(), l_NP.shape[1], r_NQ.shape[1])
    return backend_module(backend).weight_gradient(l_NP.contiguous(), r_NQ.contiguous(), ends_E, tiles)


weight_gradient = define(
    "weight_gradient(Tensor l, Tensor r, Tensor ends, Tensor tiles, str backend) -> Tensor",
    _weight_gradient,
    lambda l_NP, r_NQ, ends_E, tiles, backend: l_NP.new_empty(ends_E.numel(), l_NP.shape[1], r_NQ.shape[1]),
)
"""``out[e] = sum over rows n of e of outer(l[n], r[n])``, ``(E, P, Q)``; 0 for experts with no row."""
