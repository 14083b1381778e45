"""The expert MLP's autograd path, over any grouped-GEMM backend.

    x_TD -> gather -> X_N -> [w_up] -> H_NP -> activation -> A_NF -> [w_down] -> Y_ND -> gate, gather, sum -> y_TD

Kept for the backward pass: x, H, the gates and the route. X and A are recomputed, and Y is never needed: the gate's
gradient is ``<dA', A>`` with ``dA' = dO w_down``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import mlp_split
from .glue import activate_rows, activation_backward, combine_rows, gather_rows
from .grouped import check, make_plan, rows_times_weight, weight_gradient
from .routing import count_rows, sort_by_expert


def expert_mlp(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    expert_TK: Tensor,
    *,
    activation: str,
    backend: str,
    first_expert: int = 0,
    rows: str | int = "exact",
    num_experts: int | None = None,
    split_backward: bool = False,
) -> Tensor:
    """See :func:`moe_dtensor.kernels.experts.expert_mlp`; ``backend`` is torch, triton or grouped_gemm."""
    held_experts, _, hidden, _ = w_up_EGFD.shape
    check(backend, x_TD, hidden)
    route = sort_by_expert(expert_TK, first_expert, held_experts)
    # An unknown total with first_expert = 0 takes the static bound: right in any case, and without a sync.
    all_held = first_expert == 0 and num_experts in (None, held_experts)
    num_rows = count_rows(route, rows, held_experts, all_held)
    plan = make_plan(route.ends, num_rows, backend)
    run = mlp_split.expert_mlp if split_backward else _ExpertMLP.apply
    return run(x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, plan, num_rows, activation, backend)


class _ExpertMLP(Function):
    """All of it as one node: the host's time of a small layer is that of its nodes and launches.

    Each tensor of the backward is dropped as soon as it has been used, what was saved included: dA' and H before the
    first weight gradient is made, dO and A' before the second, dH before dx is summed.
    """

    @staticmethod
    def forward(ctx, x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, plan, num_rows, activation, backend):
        x_ND = gather_rows(x_TD, route.position, num_rows, 0)
        h_NP = rows_times_weight(x_ND, w_up_EGFD.flatten(1, 2), route.ends, plan, True, backend)
        del x_ND
        a_NF = activate_rows(h_NP, route.ends, activation)
        y_ND = rows_times_weight(a_NF, w_down_EDF, route.ends, plan, True, backend)
        del a_NF
        ctx.save_for_backward(x_TD, w_up_EGFD, w_down_EDF, gate_TK, *route, plan, h_NP)
        ctx.activation, ctx.backend = activation, backend
        return combine_rows(y_ND, route.position, gate_TK)

    @staticmethod
    def backward(ctx, dy_TD):
        x_TD, w_up_EGFD, w_down_EDF, gate_TK, position_TK, copy_N, ends_E, plan, h_NP = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()  # not if the graph is retained
        backend, num_rows = ctx.backend, h_NP.shape[0]
        x_wanted, up_wanted, down_wanted, *_ = ctx.needs_input_grad
        dx_TD = dw_up_EGFD = dw_down_EDF = None

        do_ND = gather_rows(dy_TD, position_TK, num_rows, 1)
        da_NF = rows_times_weight(do_ND, w_down_EDF, ends_E, plan, False, backend)
        dh_NP, weighted_NF, dgate_TK = activation_backward(
            h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, ctx.activation
        )
        del da_NF, h_NP
        if down_wanted:
            dw_down_EDF = weight_gradient(do_ND, weighted_NF, ends_E, plan, backend)
        del do_ND, weighted_NF
        if up_wanted:
            x_ND = gather_rows(x_TD, position_TK, num_rows, 1)
            dw_up_EGFD = weight_gradient(dh_NP, x_ND, ends_E, plan, backend).view(w_up_EGFD.shape)
            del x_ND
        if x_wanted:
            dx_ND = rows_times_weight(dh_NP, w_up_EGFD.flatten(1, 2), ends_E, plan, False, backend)
            del dh_NP
            dx_TD = combine_rows(dx_ND, position_TK, None)
        return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK.to(gate_TK.dtype), None, None, None, None, None
