"""The expert MLP's autograd path, over any grouped-GEMM backend: as one node, or as several.

    x_TD -> gather -> X_N -> [w_up] -> H_NP -> activation -> A_NF -> [w_down] -> Y_ND -> gate, gather, sum -> y_TD

With a ``group`` x and y are a rank's own tokens, gates and route those of all ranks of the group (:mod:`.exchange`).

Kept for the backward pass: x (or X, with ``keep_rows``), H, the gates and the route. X and A are recomputed, and Y is
never needed: the gate's gradient is ``<dA', A>`` with ``dA' = dO w_down``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from moe_dtensor.config.resolve import FUSED
from moe_dtensor.kernels.experts.exchange import gather_permute, leave
from moe_dtensor.kernels.experts.float8 import ExpertMLP as ExpertMLP8
from moe_dtensor.kernels.experts.grouped import check, make_tiles, rows_times_weight, weight_gradient
from moe_dtensor.kernels.experts.permute import (
    activate_rows,
    activation_backward,
    permute,
    permute_to,
    unpermute,
    weighted_activation,
)
from moe_dtensor.kernels.experts.quack import ExpertMLP as ExpertMLPFused
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
    return leave(y_ND, route.position, gate_TK, group), kept, h_NP


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
        dx_TD = leave(dx_ND, position_TK, None, group)
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
    float8: bool = False,
) -> Tensor:
    """See :func:`moe_dtensor.kernels.experts.mlp.expert_mlp`; ``backend`` is any but reference."""
    held_experts, _, hidden, _ = w_up_EGFD.shape
    check(backend, x_TD, hidden, float8)
    route = sort_by_expert(expert_TK, first_expert, held_experts)
    # An unknown total with first_expert = 0 takes the static bound: right in any case, and without a sync.
    all_held = first_expert == 0 and num_experts in (None, held_experts)
    num_rows = count_rows(route, rows, held_experts, all_held)
    tiles = make_tiles(route.ends, num_rows, backend)
    arguments = (x_TD, w_up_EGFD, w_down_EDF, gate_TK, route, tiles, num_rows, activation, backend)
    if float8:
        return ExpertMLP8.apply(*arguments, keep_rows)
    if split_backward or up_bias_EGF is not None:
        assert group is None
        return _expert_mlp_in_nodes(*arguments, up_bias_EGF, keep_rows)
    if backend == "quack" and activation in FUSED:
        return ExpertMLPFused.apply(*arguments[:8], group)
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


def _expert_mlp_in_nodes(
    x_TD: Tensor,
    w_up_EGFD: Tensor,
    w_down_EDF: Tensor,
    gate_TK: Tensor,
    route: Route,
    tiles: Tensor,
    num_rows: int,
    activation: str,
    backend: str,
    up_bias_EGF: Tensor | None = None,
    keep_rows: bool = False,
) -> Tensor:
    """The same as several nodes, for schedules that run weight gradients apart from input gradients.

    The same operators and the same bytes kept, but a node for each weight's gradient stands beside the path from y to x
    and not on it, so that a zero-bubble schedule, which runs the two apart, computes neither twice. It takes more of
    the host's time: nodes cost some ten microseconds each.

    A weight's node stands in the graph by a *handle*: a tensor without storage, of the shape of what that node needs to
    be told. ``w_down``'s is told dO and A', ``w_up``'s is told dH. Nodes created later run earlier; the order here
    therefore lets each weight's gradient be complete before the input's (FSDP reduces a block's gradients once its
    input's is there), and frees dO and A' first.
    """
    # Apart from _Up, so that dH is gone when its backward sums.
    x_ND = permute_to(x_TD, route.position, num_rows)
    h_NP = _Up.apply(x_ND, w_up_EGFD.detach().flatten(1, 2), route, tiles, backend)
    kept = (x_ND if keep_rows else x_TD).detach()
    handle_NP = _UpWeight.apply(w_up_EGFD.flatten(1, 2), kept, keep_rows, route, tiles, num_rows, backend)
    h_NP = _Join.apply(h_NP, handle_NP)
    if up_bias_EGF is not None:
        h_NP = _AddBias.apply(h_NP, up_bias_EGF.flatten(1), route, tiles, backend)
    do_ND, weighted_NF = _DownWeight.apply(w_down_EDF, route, tiles, num_rows, backend)
    return _Down.apply(h_NP, gate_TK, do_ND, weighted_NF, w_down_EDF.detach(), route, tiles, activation, backend)


def _handle(like: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape over a single element: its gradient is all that matters."""
    return like.new_empty(()).expand(shape)


def _wanted(ctx: Function, index: int) -> bool:
    """Whether this backward pass goes on to the node behind an input. Tracing and unusual callers: yes."""
    if torch.compiler.is_compiling():
        return True
    node = ctx.next_functions[index][0]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


class _Up(Function):
    """H = x w_up^T; backward gives dX of the rows."""

    @staticmethod
    def forward(ctx, x_ND, w_up_EPD, route, tiles, backend):
        ctx.save_for_backward(w_up_EPD, route.ends, tiles)
        ctx.backend = backend
        return rows_times_weight(x_ND, w_up_EPD, route.ends, tiles, True, backend)

    @staticmethod
    def backward(ctx, dh_NP):
        w_up_EPD, ends_E, tiles = ctx.saved_tensors
        return rows_times_weight(dh_NP, w_up_EPD, ends_E, tiles, False, ctx.backend), None, None, None, None


class _UpWeight(Function):
    """The handle of w_up: told dH, its gradient is ``dH^T gather(x)``."""

    @staticmethod
    def forward(ctx, w_up_EPD, kept, keep_rows, route, tiles, num_rows, backend):
        ctx.save_for_backward(kept, route.position, route.ends, tiles)
        ctx.keep_rows, ctx.num_rows, ctx.backend = keep_rows, num_rows, backend
        return _handle(kept, num_rows, w_up_EPD.shape[1])

    @staticmethod
    def backward(ctx, dh_NP):
        kept, position_TK, ends_E, tiles = ctx.saved_tensors
        x_ND = kept if ctx.keep_rows else permute(kept, position_TK, ctx.num_rows, dh_NP)
        return weight_gradient(dh_NP, x_ND, ends_E, tiles, ctx.backend), *[None] * 6


class _Join(Function):
    """The value, as the output of two nodes: both get its gradient."""

    @staticmethod
    def forward(ctx, value, handle):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class _AddBias(Function):
    """H plus each row's expert's bias; the bias's gradient is the sum of its rows, as a product with ones."""

    @staticmethod
    def forward(ctx, h_NP, bias_EP, route, tiles, backend):
        ctx.save_for_backward(route.ends, tiles)
        ctx.backend = backend
        row_N = torch.arange(h_NP.shape[0], device=h_NP.device)
        # Rows past the last end hold nothing.
        expert_N = torch.searchsorted(route.ends, row_N, right=True).clamp(max=bias_EP.shape[0] - 1)
        return h_NP + bias_EP[expert_N]

    @staticmethod
    def backward(ctx, dh_NP):
        ends_E, tiles = ctx.saved_tensors
        # Grouped GEMMs want rows of a multiple of 16 bytes.
        ones_NC = dh_NP.new_ones(dh_NP.shape[0], 16)
        return dh_NP, weight_gradient(dh_NP, ones_NC, ends_E, tiles, ctx.backend)[..., 0], None, None, None


class _DownWeight(Function):
    """The handles of w_down: told dO and A', its gradient is ``dO^T A'``."""

    @staticmethod
    def forward(ctx, w_down_EDF, route, tiles, num_rows, backend):
        ctx.save_for_backward(route.ends, tiles)
        ctx.backend = backend
        _, width, hidden = w_down_EDF.shape
        return _handle(w_down_EDF, num_rows, width), _handle(w_down_EDF, num_rows, hidden)

    @staticmethod
    def backward(ctx, do_ND, weighted_NF):
        ends_E, tiles = ctx.saved_tensors
        return weight_gradient(do_ND, weighted_NF, ends_E, tiles, ctx.backend), None, None, None, None


class _Down(Function):
    """y = sum over choices of gate * (act(H) w_down^T); backward gives dH, dgate, and what w_down's node needs."""

    @staticmethod
    def forward(ctx, h_NP, gate_TK, do_ND, weighted_NF, w_down_EDF, route, tiles, activation, backend):
        a_NF = activate_rows(h_NP, route.ends, activation)
        y_ND = rows_times_weight(a_NF, w_down_EDF, route.ends, tiles, True, backend)
        ctx.save_for_backward(h_NP, gate_TK, w_down_EDF, *route, tiles)
        ctx.activation, ctx.backend = activation, backend
        return unpermute(y_ND, route.position, gate_TK)

    @staticmethod
    def backward(ctx, dy_TD):
        h_NP, gate_TK, w_down_EDF, position_TK, copy_N, ends_E, tiles = ctx.saved_tensors
        route = Route(position_TK, copy_N, ends_E)
        do_ND = permute(dy_TD, route.position, h_NP.shape[0])
        if not (_wanted(ctx, 0) or _wanted(ctx, 1)):
            weighted_NF = weighted_activation(h_NP, gate_TK, copy_N, ends_E, ctx.activation)
            return None, None, do_ND, weighted_NF, None, None, None, None, None
        da_NF = rows_times_weight(do_ND, w_down_EDF, ends_E, tiles, False, ctx.backend)
        dh_NP, weighted_NF, dgate_TK = activation_backward(
            h_NP, da_NF, gate_TK, position_TK, copy_N, ends_E, ctx.activation
        )
        return dh_NP, dgate_TK.to(gate_TK.dtype), do_ND, weighted_NF, None, None, None, None, None
