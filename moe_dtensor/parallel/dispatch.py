"""How tokens reach the experts of other ranks and come back.

B sequences, S positions, D width, K choices, T tokens of this rank, R ranks that share the experts, N rows sent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.exchange import spread_rows, sum_rows
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import Dispatch, Experts, run_experts
from moe_dtensor.mesh import flat_dp_tp
from moe_dtensor.parallel import collectives
from moe_dtensor.parallel.borders import Borders, dp_borders, tp_borders
from moe_dtensor.parallel.dispatch_cost import choose_dispatch


class AllGather:
    """Bring all tokens to every rank, let each run its own experts on them, sum what comes back.

    No counts are exchanged, and the K outputs of a token are summed before they travel.

    Args:
        borders: of the axis that shares the experts.
        inner: what runs the experts on the tokens that are together then.
    """

    def __init__(self, borders: Borders, inner: Dispatch = run_experts) -> None:
        self.borders = borders
        self.inner = inner

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor
    ) -> Tensor:
        """``(B, S, D)`` of a rank's own tokens in and out."""
        enter, enter_data = self.borders.enter, self.borders.enter_data
        return self.borders.leave(self.inner(experts, shared, enter(x_BSD), enter(gate_BSK), enter_data(expert_BSK)))


class SharedApart:
    """The shared expert on the tokens at hand, beside a dispatch of the others."""

    def __init__(self, inner: Dispatch) -> None:
        self.inner = inner

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor
    ) -> Tensor:
        """``(B, S, D)`` of a rank's own tokens in and out."""
        y_BSD = self.inner(experts, None, x_BSD, gate_BSK, expert_BSK)
        return y_BSD if shared is None else y_BSD + shared(x_BSD)


class AllToAll:
    """Send each token once to every rank that holds one of its experts, and each rank's sum for it back.

    One read of the device a layer: how many tokens, and copies, come from whom. The shared expert works while tokens
    travel.

    Args:
        axis: the ranks that share the experts, as one mesh axis.
    """

    def __init__(self, axis: DeviceMesh) -> None:
        self.axis = axis

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor
    ) -> Tensor:
        """``(B, S, D)`` of a rank's own tokens in and out."""
        expert_TK = expert_BSK.flatten(0, 1)
        position_TR, sent_R2 = self._plan(experts, expert_TK)
        received_R2 = torch.empty_like(sent_R2)
        collectives.exchange_counts(received_R2, sent_R2, self.axis)
        counts_2R2 = torch.stack([sent_R2, received_R2]).tolist()
        sent, received = ([tokens for tokens, _ in counts_R2] for counts_R2 in counts_2R2)
        copies = sum(copies for _, copies in counts_2R2[1])

        def start(x_TC: Tensor) -> collectives.Travelling:
            return collectives.start_exchange(spread_rows(x_TC, position_TR, sum(sent)), self.axis, sent, received)

        # Ids travel beside the gates, in their dtype: whole numbers far below its precision.
        choices_N2K = start(torch.cat([gate_BSK.flatten(0, 1), expert_TK.to(gate_BSK.dtype)], 1))
        x_ND = start(x_BSD.flatten(0, 1))
        shared_BSD = None if shared is None else shared(x_BSD)
        gate_NK, expert_NK = collectives.finish_exchange(choices_N2K).chunk(2, 1)
        y_ND = experts(collectives.finish_exchange(x_ND), gate_NK, expert_NK.detach().long(), rows=copies)
        y_TD = sum_rows(collectives.exchange(y_ND, self.axis, received, sent), position_TR)
        y_BSD = y_TD.view(x_BSD.shape)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD

    def _plan(self, experts: Experts, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Where each token's row for each rank lies, ``(T, R)`` int32, -1 for none; and how many tokens and copies
        each rank is sent, ``(R, 2)``. Rows are sorted by rank, then by token."""
        ranks = self.axis.size()
        owner_TK = expert_TK.div(experts.num_experts // ranks, rounding_mode="floor")
        copies_TR = (owner_TK[..., None] == torch.arange(ranks, device=owner_TK.device)).sum(1)
        wanted_RT = (copies_TR > 0).T
        row_RT = wanted_RT.flatten().cumsum(0).view(wanted_RT.shape) - 1
        position_TR = row_RT.where(wanted_RT, -1).T.int().contiguous()
        return position_TR, torch.stack([wanted_RT.sum(1), copies_TR.sum(0)], 1)


class Shares:
    """Where all ranks of an axis hold the same tokens: each dispatches its share of them, and gathers the results.

    Args:
        axis: whose ranks hold the same.
        inner: dispatch of a share.
    """

    def __init__(self, axis: DeviceMesh, inner: Dispatch) -> None:
        self.axis = axis
        self.inner = inner

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor
    ) -> Tensor:
        """``(B, S, D)`` of all tokens in and out."""
        tokens = x_BSD.shape[0] * x_BSD.shape[1]
        more = -tokens % self.axis.size()

        def share(x_BSC: Tensor, fill: int = 0) -> Tensor:
            padded_TC = torch.nn.functional.pad(x_BSC.flatten(0, 1), (0, 0, 0, more), value=fill)
            return collectives.share(padded_TC, self.axis, 0)[None]

        y_1UD = self.inner(experts, shared, share(x_BSD), share(gate_BSK), share(expert_BSK, fill=-1))
        return collectives.gather_alike(y_1UD[0], self.axis, 0)[:tokens].view(x_BSD.shape)


def expert_axis(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that share whole experts, as one axis."""
    return flat_dp_tp(mesh) if config.mesh.experts == "dp_tp" else mesh[config.mesh.experts]


def build_dispatch(config: Config, mesh: DeviceMesh) -> tuple[Dispatch, bool]:
    """The dispatch for ``mesh.experts`` and ``mesh.dispatch``, and whether the shared expert works inside it on tokens
    that tp has brought together (else it has borders of its own)."""
    dp, tp, place = mesh["dp"], mesh["tp"], config.mesh.experts
    if tp.size() == 1 and place in ("tp", "tp_hidden"):
        return run_experts, True
    if choose_dispatch(config) == "all_to_all" and expert_ranks(config) > 1:
        inner: Dispatch = AllToAll(expert_axis(config, mesh))
        # Over dp alone, tp ranks hold the same experts and stay among themselves.
        repeated = tp.size() > 1 and not config.mesh.sequence_parallel and place != "dp"
        return SharedApart(Shares(tp, inner)) if repeated else inner, False
    if place == "dp":
        return SharedApart(AllGather(dp_borders(dp))), False
    if place == "dp_tp":
        return AllGather(tp_borders(config, tp), SharedApart(AllGather(dp_borders(dp)))), True
    return AllGather(tp_borders(config, tp)), True
