"""The expert MLP by the kernels of QuACK (the package ``quack-kernels``), on Hopper: fewer passes over memory.

    x -> [gather, w_up, activation] -> H, A -> [w_down] -> Y -> gate, gather, sum -> y
    dy -> [gather, w_down, activation's gradient, gate] -> dH, A', dgate -> [w_up] -> dX -> gather, sum -> dx

Each bracket is one kernel: tokens are gathered while a product loads them, and an activation is computed on what a
product still holds in registers, as SonicMoE does (arXiv:2512.14080). What is kept for the backward pass, and the
gate's gradient, are those of :mod:`.autograd`. Rows of tokens are written where experts are wide, or tokens come from
the memory of other ranks; then products read those.

Of a gated activation the columns of H and dH are gate, up, gate, up here. Weights lie as everywhere: all gates, then
all ups; the kernels read and write them so ("concat" in QuACK's words).

:class:`ByQuack` has the plain products, for the paths of :mod:`.autograd` that this file does not serve.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.config.resolve import WIDE
from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.exchange import gather_permute, leave
from moe_dtensor.kernels.experts.permute import permute
from moe_dtensor.kernels.library import ceil_div, define

_NAMES = {"swiglu": "swiglu", "silu": "silu", "relu2": "relu_sq"}
"""QuACK's of :data:`~moe_dtensor.config.resolve.FUSED`. (Its GELUs are approximations by tanh.)"""


def _package() -> ModuleType:
    try:
        return importlib.import_module("quack.gemm_interface")
    except ImportError as error:
        raise ValueError(
            "moe.backend = quack needs the package quack-kernels, which is not installed or not whole "
            f"({error}). Run `pip install 'moe_dtensor[quack]'`, or set moe.backend = auto."
        ) from error


@cache
def _config(rows: int, columns: int, pingpong: bool, cluster: tuple[int, int]) -> Any:
    """A tile of the result and how it is computed: pingpong has one group of warps store a tile while another
    multiplies; the multiprocessors of a cluster, as many tiles high and wide, share what they load."""
    return importlib.import_module("quack.gemm_config").GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=cluster[0],
        cluster_n=cluster[1],
        is_dynamic_persistent=False,
    )


# Measured as products alone and in the sequence of a layer on a warm card (docs/decisions/quack.md): what is fastest
# alone often is not there.
def _up_config(gathered: bool) -> Any:
    return _config(128, 192 if gathered else 128, True, (2, 1))


def _down_backward_config() -> Any:
    return _config(128, 128, True, (2, 1))


def _rows_config(inner: int, columns: int) -> Any:
    if inner >= 4096:  # storing a tile is then little beside its sums, and nothing to hide
        return _config(128, 256, False, (1, 2))
    # Of two tiles that are as fast the one that does not reach far past the last column.
    fits = ceil_div(columns, 192) * 192 <= 1.05 * columns
    return _config(128, 192, True, (2, 1)) if fits else _config(192, 128, True, (2, 1))


def _weight_config(gathered: bool) -> Any:
    return _config(128, 256, False, (1, 1)) if gathered else _config(128, 192, True, (2, 1))


class ByQuack:
    """The plain products, as those of the other backends are: H is gates, then ups."""

    @staticmethod
    def make_tiles(ends_E: Tensor, rows: int) -> Tensor:
        """``(E + 1)`` int32: the first row of each expert, then the row after the last."""
        return F.pad(ends_E, (1, 0))

    @staticmethod
    def fake_tiles(ends_E: Tensor, rows: int) -> Tensor:
        """For tracing."""
        return ends_E.new_empty(ends_E.shape[0] + 1)

    @staticmethod
    def rows_times_weight(a_N: Tensor, w_EPQ: Tensor, ends_E: Tensor, tiles: Tensor, transposed: bool) -> Tensor:
        """See :data:`.grouped.rows_times_weight`."""
        return _rows(a_N, w_EPQ, tiles, transposed, False)

    @staticmethod
    def weight_gradient(l_NP: Tensor, r_NQ: Tensor, ends_E: Tensor, tiles: Tensor) -> Tensor:
        """See :data:`.grouped.weight_gradient`."""
        return _weight(l_NP, None, r_NQ, tiles, False, False)


def _rows(a_N: Tensor, w_EPQ: Tensor, begins: Tensor, transposed: bool, paired: bool) -> Tensor:
    w_EIO = w_EPQ.mT if transposed else w_EPQ
    out_N = a_N.new_empty(a_N.shape[0], w_EIO.shape[2])
    _package().gemm_tuned.fn(
        a_N,
        w_EIO,
        out_N,
        cu_seqlens_m=begins,
        concat_layout=("B",) if paired else None,
        config=_rows_config(*w_EIO.shape[1:]),
    )
    return out_N


def _weight(l_TP: Tensor, token_N: Tensor | None, r_NQ: Tensor, begins: Tensor, swapped: bool, paired: bool) -> Tensor:
    experts, p, q = begins.shape[0] - 1, l_TP.shape[1], r_NQ.shape[1]
    out = l_TP.new_empty((experts, q, p) if swapped else (experts, p, q))
    _package().gemm_tuned.fn(
        l_TP.T,
        r_NQ,
        out.mT if swapped else out,
        cu_seqlens_k=begins,
        A_idx=token_N,
        concat_layout=("out",) if paired else None,
        config=_weight_config(token_N is not None),
    )
    return out


# ---- operators: token_N is the token in each row; None: x has those rows itself --------------------------------------


def _by_row(copy_N: Tensor, gate_TK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    copy_N = F.pad(copy_N[:rows], (0, max(0, rows - copy_N.shape[0]))).clamp(0, max(0, gate_TK.numel() - 1))
    gate_N = gate_TK.flatten()[copy_N] if gate_TK.numel() else gate_TK.new_zeros(rows)
    return copy_N // gate_TK.shape[1], gate_N.float()


by_row = define(
    "quack_by_row(Tensor copy, Tensor gate, SymInt rows) -> (Tensor, Tensor)",
    _by_row,
    lambda copy_N, gate_TK, rows: (copy_N.new_empty(rows), gate_TK.new_empty(rows, dtype=torch.float32)),
)
"""``(token_N, gate_N)``: the token in each row, int32, and its gate there. Rows that hold nothing get any."""


def _up(x_TD: Tensor, token_N: Tensor | None, w_EPD: Tensor, begins: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    h_NP, a_NF = _fake_up(x_TD, token_N, w_EPD, begins, activation)
    if h_NP.numel():
        _package().gemm_act(
            x_TD.contiguous(),
            w_EPD.mT,
            activation=_NAMES[activation],
            preact_out=h_NP,
            postact_out=a_NF,
            cu_seqlens_m=begins,
            A_idx=token_N,
            concat_layout=("B",) if num_up_projections(activation) == 2 else None,
            tuned=False,
            config=_up_config(token_N is not None),
        )
    return h_NP, a_NF


def _fake_up(
    x_TD: Tensor, token_N: Tensor | None, w_EPD: Tensor, begins: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    rows, columns = (x_TD if token_N is None else token_N).shape[0], w_EPD.shape[1]
    return x_TD.new_empty(rows, columns), x_TD.new_empty(rows, columns // num_up_projections(activation))


up = define(
    "quack_up(Tensor x, Tensor? token, Tensor w, Tensor begins, str activation) -> (Tensor, Tensor)", _up, _fake_up
)
"""``(h_NP, a_NF)``: H and the activation of each row."""


def _times(a_NC: Tensor, w_EPQ: Tensor, begins: Tensor, transposed: bool, paired: bool) -> Tensor:
    if not a_NC.numel():
        return a_NC.new_empty(0, w_EPQ.shape[1 if transposed else 2])
    return _rows(a_NC, w_EPQ, begins, transposed, paired)


rows_times_weight = define(
    "quack_rows_times_weight(Tensor a, Tensor w, Tensor begins, bool transposed, bool paired) -> Tensor",
    _times,
    lambda a_NC, w_EPQ, begins, transposed, paired: a_NC.new_empty(a_NC.shape[0], w_EPQ.shape[1 if transposed else 2]),
)
""":data:`.grouped.rows_times_weight`; ``paired``: columns of a are gate, up, gate, up."""


def _down_backward(
    dy_TD: Tensor,
    token_N: Tensor | None,
    w_EDF: Tensor,
    h_NP: Tensor,
    gate_N: Tensor,
    position_TK: Tensor,
    begins: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dh_NP, weighted_NF, dgate_TK = _fake_down_backward(
        dy_TD, token_N, w_EDF, h_NP, gate_N, position_TK, begins, activation
    )
    if not h_NP.numel():
        return dh_NP, weighted_NF, dgate_TK.zero_()
    *_, dgate_N = _package().gemm_dact(
        dy_TD.contiguous(),
        w_EDF,
        PreAct=h_NP,
        activation=_NAMES[activation],
        dx_out=dh_NP,
        postact_out=weighted_NF,
        colvec_scale=gate_N,
        colvec_reduce=True,
        cu_seqlens_m=begins,
        A_idx=token_N,
        dynamic_scheduler=False,
        tuned=False,
        config=_down_backward_config(),
    )
    return dh_NP, weighted_NF, dgate_N[position_TK.clamp(min=0)].where(position_TK >= 0, 0)


def _fake_down_backward(
    dy_TD: Tensor,
    token_N: Tensor | None,
    w_EDF: Tensor,
    h_NP: Tensor,
    gate_N: Tensor,
    position_TK: Tensor,
    begins: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dgate_TK = h_NP.new_empty(position_TK.shape, dtype=torch.float32)
    return torch.empty_like(h_NP), h_NP.new_empty(h_NP.shape[0], w_EDF.shape[2]), dgate_TK


down_backward = define(
    "quack_down_backward(Tensor dy, Tensor? token, Tensor w, Tensor h, Tensor gate, Tensor position, Tensor begins, "
    "str activation) -> (Tensor, Tensor, Tensor)",
    _down_backward,
    _fake_down_backward,
)
"""``(dh_NP, weighted_NF, dgate_TK)``, as :data:`.permute.activation_backward` has them."""


def _gradient(
    l_TP: Tensor, token_N: Tensor | None, r_NQ: Tensor, begins: Tensor, swapped: bool, paired: bool
) -> Tensor:
    if not r_NQ.numel():
        return _fake_gradient(l_TP, token_N, r_NQ, begins, swapped, paired).zero_()
    return _weight(l_TP.contiguous(), token_N, r_NQ, begins, swapped, paired)


def _fake_gradient(
    l_TP: Tensor, token_N: Tensor | None, r_NQ: Tensor, begins: Tensor, swapped: bool, paired: bool
) -> Tensor:
    experts, p, q = begins.shape[0] - 1, l_TP.shape[1], r_NQ.shape[1]
    return l_TP.new_empty((experts, q, p) if swapped else (experts, p, q))


weight_gradient = define(
    "quack_weight_gradient(Tensor l, Tensor? token, Tensor r, Tensor begins, bool swapped, bool paired) -> Tensor",
    _gradient,
    _fake_gradient,
)
"""``out[e] = sum over rows n of e of outer(l[token[n]], r[n])``, ``(E, P, Q)``; ``swapped``: of outer(r, l),
``(E, Q, P)``. ``paired``: columns of r are gate, up, gate, up."""


# ---- the MLP --------------------------------------------------------------------------------------------------------


class ExpertMLP(Function):
    """All of it as one node, as that of :mod:`.autograd` is, for activations in
    :data:`~moe_dtensor.config.resolve.FUSED`."""

    @staticmethod
    def forward(ctx, x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, begins, num_rows, activation, group):
        """``(T, D)``; ``group`` as in :mod:`.autograd`."""
        token_N, gate_N = by_row(route.copy, gate_TK, num_rows)
        rows, x_SD = _enter(x_TD, route.position, token_N, w_down_EDF, group)
        h_NP, a_NF = up(*rows, w_up_EGFD.flatten(1, 2), begins, activation)
        del rows
        y_ND = rows_times_weight(a_NF, w_down_EDF, begins, True, False)
        del a_NF
        ctx.save_for_backward(x_SD, w_up_EGFD, w_down_EDF, gate_TK, route.position, token_N, gate_N, begins, h_NP)
        ctx.activation, ctx.group = activation, group
        return leave(y_ND, route.position, gate_TK, group)

    @staticmethod
    def backward(ctx, dy_TD):
        """Of x, both weights and the gate; every tensor is dropped as soon as it has been used."""
        x_SD, w_up_EGFD, w_down_EDF, gate_TK, position_TK, token_N, gate_N, begins, h_NP = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()  # H is dropped as soon as it has been used
        wanted, paired = ctx.needs_input_grad, num_up_projections(ctx.activation) == 2
        dx_TD = dw_up_EGFD = dw_down_EDF = None
        rows, _ = _enter(dy_TD, position_TK, token_N, w_down_EDF, ctx.group)
        dh_NP, weighted_NF, dgate_TK = down_backward(
            *rows, w_down_EDF, h_NP, gate_N, position_TK, begins, ctx.activation
        )
        del h_NP
        if wanted[2]:
            dw_down_EDF = weight_gradient(*rows, weighted_NF, begins, False, False)
        del rows, weighted_NF
        if wanted[1]:
            rows, _ = _enter(x_SD, position_TK, token_N, w_down_EDF, None, dh_NP)
            dw_up_EGFD = weight_gradient(*rows, dh_NP, begins, True, paired).view(w_up_EGFD.shape)
            del rows
        if wanted[0]:
            dx_ND = rows_times_weight(dh_NP, w_up_EGFD.flatten(1, 2), begins, False, paired)
            del dh_NP
            dx_TD = leave(dx_ND, position_TK, None, ctx.group)
        return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK.to(gate_TK.dtype), *[None] * 5


def _enter(
    x_TD: Tensor, position_TK: Tensor, token_N: Tensor, w_EDF: Tensor, group: str | None, after: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """What a product reads: tokens and which is in each row, or the rows themselves and None; and all tokens.

    ``after`` as in :data:`.permute.permute`."""
    if group is not None:
        x_ND, x_SD = gather_permute(x_TD, position_TK, token_N.shape[0], group)
        return (x_ND, None), x_SD
    if w_EDF.shape[2] >= WIDE:
        return (permute(x_TD, position_TK, token_N.shape[0], after), None), x_TD
    return (x_TD, token_N), x_TD
