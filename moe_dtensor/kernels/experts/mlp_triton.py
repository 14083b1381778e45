"""Forward and backward of the expert MLP as straight sequences of Triton launches.

The same launches as :mod:`.mlp_operators` makes on the ``triton`` backend, to the same bytes, but looked up together
and with one buffer for all rows of width D: small layers are bound by the host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dtensor.kernels.experts import grouped_triton, permute_triton
from moe_dtensor.kernels.experts.sort import Route
from moe_dtensor.kernels.launch import Launcher


class _Launchers(NamedTuple):
    gather: Launcher
    up: Launcher
    activate: Launcher
    down: Launcher
    combine: Launcher
    down_backward: Launcher
    activation_backward: Launcher
    down_weight: Launcher
    up_weight: Launcher
    up_backward: Launcher
    add: Launcher


@lru_cache
def _launchers(
    device: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    copies: tuple[int, int],
    weight: tuple[int, int, int, int],
    rows: int,
    activation: str,
) -> _Launchers:
    experts, groups, hidden, width = weight
    up, down = (experts, groups * hidden, width), (experts, width, hidden)
    here = (device, dtype)
    activate = (rows, hidden, experts)
    return _Launchers(
        gather=permute_triton.gather_launcher(*here, *copies, width),
        up=grouped_triton.rows_launcher(*here, rows, *up, True),
        activate=permute_triton.activate_launcher(*here, None, *activate, activation),
        down=grouped_triton.rows_launcher(*here, rows, *down, True),
        combine=permute_triton.combine_launcher(*here, gate_dtype, *copies, width),
        down_backward=grouped_triton.rows_launcher(*here, rows, *down, False),
        activation_backward=permute_triton.activation_backward_launcher(
            *here, gate_dtype, *activate, copies[0] * copies[1], activation
        ),
        down_weight=grouped_triton.weight_launcher(*here, *down),
        up_weight=grouped_triton.weight_launcher(*here, *up),
        up_backward=grouped_triton.rows_launcher(*here, rows, *up, False),
        add=permute_triton.combine_launcher(*here, None, *copies, width),
    )


def forward(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    route: Route,
    plan: Tensor,
    num_rows: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`moe_dtensor.kernels.experts.sequence.forward`; at least one row."""
    position_TK, _, ends_E = route
    _, groups, hidden, width = shape = w_up_EGFD.shape
    run = _launchers(x_TD.get_device(), x_TD.dtype, gate_TK.dtype, gate_TK.shape, shape, num_rows, activation)
    rows_ND, h_NP = x_TD.new_empty(num_rows, width), x_TD.new_empty(num_rows, groups * hidden)
    run.gather(x_TD.contiguous(), position_TK, rows_ND)
    run.up(rows_ND, w_up_EGFD.contiguous(), h_NP, ends_E, plan)
    a_NF = x_TD.new_empty(num_rows, hidden)
    run.activate(h_NP, ends_E, a_NF, None, None)
    run.down(a_NF, w_down_EDF.contiguous(), rows_ND, ends_E, plan)
    del a_NF
    y_TD = x_TD.new_empty(x_TD.shape)
    run.combine(rows_ND, position_TK, gate_TK.contiguous(), y_TD)
    return y_TD, h_NP


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    route: Route,
    plan: Tensor,
    saved: list[Tensor],
    wanted: tuple[bool, ...],
    activation: str,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """See :func:`moe_dtensor.kernels.experts.sequence.backward`."""
    position_TK, copy_N, ends_E = route
    dx_TD = dw_up_EGFD = dw_down_EDF = None
    h_NP = saved.pop()
    num_rows, shape = h_NP.shape[0], w_up_EGFD.shape
    run = _launchers(x_TD.get_device(), x_TD.dtype, gate_TK.dtype, gate_TK.shape, shape, num_rows, activation)
    rows_ND, a_shape = x_TD.new_empty(num_rows, shape[3]), (num_rows, shape[2])
    da_NF = x_TD.new_empty(a_shape)
    run.gather(dy_TD.contiguous(), position_TK, rows_ND)
    run.down_backward(rows_ND, w_down_EDF.contiguous(), da_NF, ends_E, plan)
    dh_NP, weighted_NF = torch.empty_like(h_NP), x_TD.new_empty(a_shape)
    dgate_TK = gate_TK.new_empty(gate_TK.shape, dtype=torch.float32)
    run.activation_backward(
        h_NP, da_NF, gate_TK.contiguous(), position_TK, copy_N, ends_E, dh_NP, weighted_NF, dgate_TK
    )
    del da_NF, h_NP
    if wanted[2]:
        dw_down_EDF = x_TD.new_empty(w_down_EDF.shape)
        run.down_weight(rows_ND, weighted_NF, dw_down_EDF, ends_E)
    del weighted_NF
    if wanted[1]:
        run.gather(x_TD.contiguous(), position_TK, rows_ND)
        dw_up_EGFD = x_TD.new_empty(shape)
        run.up_weight(dh_NP, rows_ND, dw_up_EGFD, ends_E)
    if wanted[0]:
        run.up_backward(dh_NP, w_up_EGFD.contiguous(), rows_ND, ends_E, plan)
        del dh_NP
        dx_TD = x_TD.new_empty(x_TD.shape)
        run.add(rows_ND, position_TK, None, dx_TD)
    return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK
