"""What the package quack-kernels computes for us, in plain PyTorch on any device: a stand-in with its signatures.

As the package's kernels do, it reads and writes no row past the last begin, and weights with a ``concat_layout`` as
all gates, then all ups, where rows have them in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

ACTIVATIONS = {"silu": torch.nn.functional.silu, "relu_sq": lambda x: x.relu().square()}


@dataclass(frozen=True)
class GemmConfig:
    tile_m: int
    tile_n: int
    pingpong: bool
    cluster_m: int
    cluster_n: int
    is_dynamic_persistent: bool


def activate(h_NP: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        return ACTIVATIONS["silu"](h_NP[:, ::2]) * h_NP[:, 1::2]
    return ACTIVATIONS[activation](h_NP)


def in_turn(w: Tensor, dim: int) -> Tensor:
    """All gates, then all ups, as gate, up, gate, up."""
    return torch.stack(w.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def pieces(begins: Tensor) -> list[tuple[int, int, int]]:
    assert begins.dtype == torch.int32
    at = begins.tolist()
    return [(expert, a, b) for expert, (a, b) in enumerate(pairwise(at))]


def checked(config: GemmConfig, gathers: bool) -> None:
    assert isinstance(config, GemmConfig)
    assert not (gathers and (config.tile_n == 208 or config.cluster_n != 1))


def gemm(A, B, out, *, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, concat_layout=None, config) -> None:
    checked(config, A_idx is not None)
    assert A_idx is None or A_idx.dtype == torch.int32
    if cu_seqlens_k is not None:
        assert B.is_contiguous()
        assert A.T.is_contiguous()
        assert out.is_contiguous() or out.mT.is_contiguous()
        for expert, a, b in pieces(cu_seqlens_k):
            left = A[:, a:b] if A_idx is None else A[:, A_idx[a:b].long()]
            product = left @ B[a:b]
            out[expert] = torch.cat((product[:, ::2], product[:, 1::2]), 1) if concat_layout == ("out",) else product
        return
    assert A.is_contiguous()
    assert concat_layout in (None, ("B",))
    for expert, a, b in pieces(cu_seqlens_m):
        out[a:b] = A[a:b] @ (in_turn(B[expert], 0) if concat_layout else B[expert])


def gemm_act(A, B, *, activation, preact_out, postact_out, cu_seqlens_m, A_idx, concat_layout, tuned, config) -> None:
    checked(config, A_idx is not None)
    assert A.is_contiguous()
    assert not tuned
    for expert, a, b in pieces(cu_seqlens_m):
        rows = A[a:b] if A_idx is None else A[A_idx[a:b].long()]
        h = rows @ (in_turn(B[expert], 1) if concat_layout == ("B",) else B[expert])
        preact_out[a:b], postact_out[a:b] = h, activate(h, activation)


def gemm_dact(
    A,
    B,
    *,
    PreAct,
    activation,
    dx_out,
    postact_out,
    colvec_scale,
    colvec_reduce,
    cu_seqlens_m,
    A_idx,
    dynamic_scheduler,
    tuned,
    config,
):
    checked(config, A_idx is not None)
    assert A.is_contiguous()
    assert colvec_scale.dtype == torch.float32
    assert colvec_reduce
    assert not tuned
    assert not dynamic_scheduler
    sums = torch.full(PreAct.shape[:1], torch.nan, dtype=torch.float32, device=A.device)
    for expert, a, b in pieces(cu_seqlens_m):
        da = (A[a:b] if A_idx is None else A[A_idx[a:b].long()]) @ B[expert]
        scale = colvec_scale[a:b, None].to(A.dtype)
        with torch.enable_grad():
            h = PreAct[a:b].detach().requires_grad_()
            act = activate(h, activation)
            (dx_out[a:b],) = torch.autograd.grad(act, h, da * scale)
        postact_out[a:b] = act.detach() * scale
        sums[a:b] = (act.detach() * da).sum(1)
    return dx_out, postact_out, sums


MODULES = {
    "quack.gemm_interface": SimpleNamespace(
        gemm_act=gemm_act, gemm_dact=gemm_dact, gemm_tuned=SimpleNamespace(fn=gemm)
    ),
    "quack.gemm_config": SimpleNamespace(GemmConfig=GemmConfig),
}
