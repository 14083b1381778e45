"""The operators of the expert MLP's forward and backward, in order, for every backend."""

from __future__ import annotations

from torch import Tensor

from moe_dtensor.kernels.experts.grouped import rows_times_weight, weight_gradient
from moe_dtensor.kernels.experts.permute import activate_rows, activation_backward, combine_rows, gather_rows
from moe_dtensor.kernels.experts.sort import Route


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
    """``(y_TD, h_NP)``: the output, and what the backward needs of what came in between."""
    x_ND = gather_rows(x_TD, route.position, num_rows)
    h_NP = rows_times_weight(x_ND, w_up_EGFD.flatten(1, 2), route.ends, plan, True, backend)
    del x_ND
    a_NF = activate_rows(h_NP, route.ends, activation)
    y_ND = rows_times_weight(a_NF, w_down_EDF, route.ends, plan, True, backend)
    del a_NF
    return combine_rows(y_ND, route.position, gate_TK), h_NP


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
    """Gradients of x, w_up, w_down (None where not wanted) and the gate (float32).

    Every tensor is dropped as soon as it has been used: dA' and H before the first weight gradient is made, dO and A'
    before the second, dH before dx is summed. ``saved`` holds H, and is empty afterwards.
    """
    position_TK, _, ends_E = route
    dx_TD = dw_up_EGFD = dw_down_EDF = None
    h_NP = saved.pop()
    num_rows = h_NP.shape[0]
    do_ND = gather_rows(dy_TD, position_TK, num_rows)
    da_NF = rows_times_weight(do_ND, w_down_EDF, ends_E, plan, False, backend)
    dh_NP, weighted_NF, dgate_TK = activation_backward(h_NP, da_NF, gate_TK, *route, activation)
    del da_NF, h_NP
    if wanted[2]:
        dw_down_EDF = weight_gradient(do_ND, weighted_NF, ends_E, plan, backend)
    del do_ND, weighted_NF
    if wanted[1]:
        x_ND = gather_rows(x_TD, position_TK, num_rows, dh_NP)
        dw_up_EGFD = weight_gradient(dh_NP, x_ND, ends_E, plan, backend).view(w_up_EGFD.shape)
        del x_ND
    if wanted[0]:
        dx_ND = rows_times_weight(dh_NP, w_up_EGFD.flatten(1, 2), ends_E, plan, False, backend)
        del dh_NP
        dx_TD = combine_rows(dx_ND, position_TK, None)
    return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK
