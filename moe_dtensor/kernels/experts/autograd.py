"""The expert MLP's autograd path, over any grouped-GEMM backend.

    x_TD -> gather -> X_N -> [w_up] -> H_NP -> activation -> A_NF -> [w_down] -> Y_ND -> gate, gather, sum -> y_TD

With a ``group`` x and y are a rank's own tokens, gates and route those of all ranks of the group (:mod:`.exchange`).

Kept for the backward pass: x (or X, with ``keep_rows``), H, the gates and the route. X and A are recomputed, and Y is
never needed: the gate's gradient is ``<dA', A>`` with ``dA' = dO w_down``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.kernels.experts import split_nodes
from moe_dtensor.kernels.experts.exchange import gather_permute, unpermute_scatter
from moe_dtensor.kernels.experts.grouped import check, make_tiles, rows_times_weight, weight_gradient
from moe_dtensor.kernels.experts.permute import activate_rows, activation_backward, permute, unpermute
from moe_dtensor.kernels.experts.sort import Route, count_rows, sort_by_expert


def run_forward(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    route: Route,
    tiles: Tensor,
    num_rows: int,
    activation: str,
    backend: str,
    group: str | None,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y_TD, x, h_NP)``: the output, and what the backward needs: all tokens or their rows, and what came in
    between."""
    if group is None:
        x_ND, x_SD = permute(x_TD, route.position, num_rows), x_TD
    else:
        x_ND, x_SD = gather_permute(x_TD, route.position, num_rows, group)
    kept = x_ND if keep_rows else x_SD
    h_NP = rows_times_weight(x_ND, w_up_EGFD.flatten(1, 2), route.ends, tiles, True, backend)
    del x_ND
    a_NF = activate_rows(h_NP, route.ends, activation)
    y_ND = rows_times_weight(a_NF, w_down_EDF, route.ends, tiles, True, backend)
    del a_NF
    return _leave(y_ND, route.position, gate_TK, group), kept, h_NP


def _leave(y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None, group: str | None) -> Tensor:
    return (
        unpermute(y_ND, position_SK, gate_SK) if group is None else unpermute_scatter(y_ND, position_SK, gate_SK, group)
    )


def run_backward(
    dy_TD: Tensor,
    kept: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    route: Route,
    tiles: Tensor,
    saved: list[Tensor],
    wanted: tuple[bool, ...],
    activation: str,
    backend: str,
    group: str | None,
    keep_rows: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, w_up, w_down (None where not wanted) and the gate (float32).

    Every tensor is dropped as soon as it has been used: dA' and H before the first weight gradient is made, dO and A'
    before the second, dH before dx is summed. ``saved`` holds H, and is empty afterwards.
    """
    position_TK, _, ends_E = route
    dx_TD = dw_up_EGFD = dw_down_EDF = None
    h_NP = saved.pop()
    num_rows = h_NP.shape[0]
    if group is None:
        do_ND = permute(dy_TD, position_TK, num_rows)
    else:
        do_ND, _ = gather_permute(dy_TD, position_TK, num_rows, group)
    da_NF = rows_times_weight(do_ND, w_down_EDF, ends_E, tiles, False, backend)
    dh_NP, weighted_NF, dgate_TK = activation_backward(h_NP, da_NF, gate_TK, *route, activation)
    del da_NF, h_NP
    if wanted[2]:
        dw_down_EDF = weight_gradient(do_ND, weighted_NF, ends_E, tiles, backend)
    del do_ND, weighted_NF
    if wanted[1]:
        x_ND = kept if keep_rows else permute(kept, position_TK, num_rows, dh_NP)
        dw_up_EGFD = weight_gradient(dh_NP, x_ND, ends_E, tiles, backend).view(w_up_EGFD.shape)
        del x_ND
    if wanted[0]:
        dx_ND = rows_times_weight(dh_NP, w_up_EGFD.flatten(1, 2), ends_E, tiles, False, backend)
        del dh_NP
        dx_TD = _leave(dx_ND, position_TK, None, group)
    return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK


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
    group: str | None = None,
    keep_rows: bool = False,
) -> Tensor:
    """See :func:`moe_dtensor.kernels.experts.mlp.expert_mlp`; ``backend`` is torch, triton or grouped_gemm."""
    held_experts, _, hidden, _ = w_up_EGFD.shape
    check(backend, x_TD, hidden)
    route = sort_by_expert(expert_TK, first_expert, held_experts)
    # An unknown total with first_expert = 0 takes the static bound: right in any case, and without a sync.
    all_held = first_expert == 0 and num_experts in (None, held_experts)
    num_rows = count_rows(route, rows, held_experts, all_held)
    tiles = make_tiles(route.ends, num_rows, backend)
    arguments = (x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, tiles, num_rows, activation, backend)
    if split_backward or up_bias_EGF is not None:
        assert group is None
        return split_nodes.expert_mlp(*arguments, up_bias_EGF, keep_rows)
    return _ExpertMLP.apply(*arguments, group, keep_rows)


class _ExpertMLP(Function):
    """All of it as one node: the host's time of a small layer is that of its nodes and launches."""

    @staticmethod
    def forward(
        ctx, x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, tiles, num_rows, activation, backend, group, keep_rows
    ):
        y_TD, kept, h_NP = run_forward(
            x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, tiles, num_rows, activation, backend, group, keep_rows
        )
        ctx.save_for_backward(kept, w_up_EGFD, w_down_EDF, gate_TK, *route, tiles, h_NP)
        ctx.activation, ctx.backend, ctx.group, ctx.keep_rows = activation, backend, group, keep_rows
        return y_TD

    @staticmethod
    def backward(ctx, dy_TD):
        kept, w_up_EGFD, w_down_EDF, gate_TK, position_TK, copy_N, ends_E, tiles, h_NP = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            # H is dropped as soon as it has been used; not if the graph is retained.
            ctx.maybe_clear_saved_tensors()
        saved = [h_NP]
        del h_NP
        dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK = run_backward(
            dy_TD,
            kept,
            w_up_EGFD,
            w_down_EDF,
            gate_TK,
            Route(position_TK, copy_N, ends_E),
            tiles,
            saved,
            ctx.needs_input_grad,
            ctx.activation,
            ctx.backend,
            ctx.group,
            ctx.keep_rows,
        )
        return dx_TD, dw_up_EGFD, dw_down_EDF, dgate_TK.to(gate_TK.dtype), *[None] * 7
