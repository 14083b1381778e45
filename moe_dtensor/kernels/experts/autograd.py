"""The expert MLP's autograd path, over any grouped-GEMM backend.

    x_TD -> gather -> X_N -> [w_up] -> H_NP -> activation -> A_NF -> [w_down] -> Y_ND -> gate, gather, sum -> y_TD

Kept for the backward pass: x, H, the gates and the route. X and A are recomputed, and Y is never needed: the gate's
gradient is ``<dA', A>`` with ``dA' = dO w_down``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.experts import sequence, split_nodes
from moe_dtensor.kernels.experts.grouped import check, make_plan
from moe_dtensor.kernels.experts.sort import Route, count_rows, sort_by_expert


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
    up_bias_EGF: Tensor | None = None,
) -> Tensor:
    """See :func:`moe_dtensor.kernels.experts.mlp.expert_mlp`; ``backend`` is torch, triton or grouped_gemm."""
    held_experts, _, hidden, _ = w_up_EGFD.shape
    check(backend, x_TD, hidden)
    route = sort_by_expert(expert_TK, first_expert, held_experts)
    # An unknown total with first_expert = 0 takes the static bound: right in any case, and without a sync.
    all_held = first_expert == 0 and num_experts in (None, held_experts)
    num_rows = count_rows(route, rows, held_experts, all_held)
    plan = make_plan(route.ends, num_rows, backend)
    arguments = (x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, plan, num_rows, activation, backend)
    if split_backward or up_bias_EGF is not None:
        return split_nodes.expert_mlp(*arguments, up_bias_EGF)
    return _ExpertMLP.apply(*arguments)


class _ExpertMLP(Function):
    """All of it as one node: the host's time of a small layer is that of its nodes and launches."""

    @staticmethod
    def forward(ctx, x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, plan, num_rows, activation, backend):
        y_TD, h_NP = sequence.forward(x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, plan, num_rows, activation, backend)
        ctx.save_for_backward(x_TD, w_up_EGFD, w_down_EDF, gate_TK, *route, plan, h_NP)
        ctx.activation, ctx.backend = activation, backend
        return y_TD

    @staticmethod
    def backward(ctx, dy_TD):
        x_TD, w_up_EGFD, w_down_EDF, gate_TK, position_TK, copy_N, ends_E, plan, h_NP = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            # H is dropped as soon as it has been used; not if the graph is retained.
            ctx.maybe_clear_saved_tensors()
        saved = [h_NP]
        del h_NP
        dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK = sequence.backward(
            dy_TD,
            x_TD,
            w_up_EGFD,
            w_down_EDF,
            gate_TK,
            Route(position_TK, copy_N, ends_E),
            plan,
            saved,
            ctx.needs_input_grad,
            ctx.activation,
            ctx.backend,
        )
        return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK.to(gate_TK.dtype), None, None, None, None, None
