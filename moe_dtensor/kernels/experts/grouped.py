"""Grouped GEMMs: rows sorted by expert times each expert's weight, and the weights' gradients, by backend.

Those of ``torch`` and of the package ``grouped_gemm`` stand here, those of ``triton`` in :mod:`.grouped_triton`, those
of ``quack`` in :mod:`.quack`. P and Q are a weight's two sides, ``w_EPQ``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dtensor.kernels.experts.quack import ByQuack
from moe_dtensor.kernels.library import define, launches_triton, triton_kernels

_DTYPES = {
    "torch": (torch.bfloat16, torch.float16, torch.float32),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "grouped_gemm": (torch.bfloat16,),
    "quack": (torch.bfloat16, torch.float16),
}


def check(backend: str, x_TD: Tensor, hidden: int, float8: bool = False) -> None:
    """Raise ValueError for a dtype, device or size (D, F) that a backend does not take."""
    remedy = "set moe.backend = reference"
    if x_TD.dtype not in _DTYPES[backend]:
        raise ValueError(f"moe.backend = {backend} does not take {x_TD.dtype}: {remedy}.")
    if backend in ("grouped_gemm", "quack") and not x_TD.is_cuda:
        raise ValueError(f"moe.backend = {backend} runs on CUDA, not on {x_TD.device.type}: {remedy}.")
    if backend == "triton" and not launches_triton(x_TD):
        raise ValueError(f"moe.backend = triton runs on CUDA, not on {x_TD.device.type}: {remedy}.")
    # The hardware's bulk loads take rows that start at multiples of 16 bytes.
    dtype = torch.float8_e4m3fn if float8 else x_TD.dtype
    step, width = 16 // dtype.itemsize, x_TD.shape[1]
    if width % step or hidden % step:
        raise ValueError(
            f"moe.backend = {backend} needs model.dim and moe.hidden_dim to be multiples of {step} in {dtype} "
            f"(16 bytes), but they are {width} and {hidden}: round them up, or {remedy}."
        )


class ByTorch:
    """``torch.nn.functional.grouped_mm``."""

    @staticmethod
    def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
        """Nothing to precompute."""
        return ends_E.new_empty(0)

    fake_tiles = make_tiles

    @staticmethod
    def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
        """See :data:`rows_times_weight`."""
        return F.grouped_mm(a_N, w_EPQ.transpose(1, 2) if transposed else w_EPQ, offs=ends_E)

    @staticmethod
    def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
        """See :data:`weight_gradient`."""
        return F.grouped_mm(l_NP.T, r_NQ, offs=ends_E)


class ByPackage:
    """The PyPI package ``grouped_gemm`` (CUDA, bf16; counts per expert on the host: one sync a layer)."""

    @staticmethod
    def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
        """Rows of each expert, int64, on the host (a sync)."""
        ends = ends_E.cpu().long()
        return torch.diff(ends, prepend=ends.new_zeros(1))

    @staticmethod
    def fake_tiles(ends_E: Tensor, rows: int) -> Tensor:
        """For tracing."""
        return torch.empty(ends_E.shape, dtype=torch.int64, device="cpu")

    @staticmethod
    def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
        """See :data:`rows_times_weight`."""
        out_N = a_N.new_empty(a_N.shape[0], w_EPQ.shape[1 if transposed else 2])
        # The package wants as many rows as the counts add up to; ours may be more.
        held = int(tiles.sum())
        _package().gmm(a_N[:held], w_EPQ, tiles, trans_a=False, trans_b=transposed, c=out_N[:held])
        return out_N

    @staticmethod
    def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
        """See :data:`weight_gradient`."""
        held = int(tiles.sum())
        out_EPQ = _package().gmm(l_NP[:held], r_NQ[:held], tiles, trans_a=True, trans_b=False)
        # One product for each expert: nothing promises that one over no rows writes zeros.
        for expert in (tiles == 0).nonzero().flatten().tolist():
            out_EPQ[expert].zero_()
        return out_EPQ


def _package() -> ModuleType:
    try:
        return importlib.import_module("grouped_gemm.backend")
    except ImportError as error:
        raise ValueError(
            "moe.backend = grouped_gemm needs the package grouped_gemm, which is not installed. On a machine with the "
            "CUDA toolkit run `pip install --no-build-isolation 'moe_dtensor[grouped_gemm]'` (nv-grouped-gemm serves "
            "too, and builds on CUDA 13), or set moe.backend = torch."
        ) from error


_PLAIN = {"torch": ByTorch, "grouped_gemm": ByPackage, "quack": ByQuack}


def _by(backend: str) -> Any:
    """What computes for a backend: ``make_tiles`` (what it precomputes from the rows' ends), ``fake_tiles``,
    ``rows_times_weight`` and ``weight_gradient``."""
    if backend == "triton":
        return triton_kernels("experts.grouped")
    return _PLAIN[backend]


def _make_tiles(ends_E: Tensor, rows: int, backend: str) -> Tensor:
    return _by(backend).make_tiles(ends_E, rows)


make_tiles = define(
    "make_tiles(Tensor ends, SymInt rows, str backend) -> Tensor",
    _make_tiles,
    lambda ends_E, rows, backend: _by(backend).fake_tiles(ends_E, rows),
)
"""What a backend's GEMMs share: the tile table of ``triton``, the host's counts of ``grouped_gemm``, else nothing."""


def _rows_times_weight(
    a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool, backend: str
) -> Tensor:
    if a_N.shape[0] == 0:
        return _fake_rows_times_weight(a_N, w_EPQ, ends_E, tiles, transposed, backend)
    return _by(backend).rows_times_weight(a_N.contiguous(), w_EPQ.contiguous(), ends_E, tiles, transposed)


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
    return _by(backend).weight_gradient(l_NP.contiguous(), r_NQ.contiguous(), ends_E, tiles)


weight_gradient = define(
    "weight_gradient(Tensor l, Tensor r, Tensor ends, Tensor tiles, str backend) -> Tensor",
    _weight_gradient,
    lambda l_NP, r_NQ, ends_E, tiles, backend: l_NP.new_empty(ends_E.numel(), l_NP.shape[1], r_NQ.shape[1]),
)
"""``out[e] = sum over rows n of e of outer(l[n], r[n])``, ``(E, P, Q)``; 0 for experts with no row."""
