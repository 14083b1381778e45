"""Dispatch and combine: tokens to the experts of other ranks, and the outputs back.

D width, K choices, T tokens of this rank (in any order: nothing here depends on it), R ranks that share the experts,
N rows sent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import choose_dispatch
from moe_dtensor.kernels.experts.mlp import choose_backend
from moe_dtensor.kernels.experts.permute import permute_to, unpermute_from
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import Dispatch, Experts, Route, run_experts
from moe_dtensor.mesh import expert_axis, expert_mesh
from moe_dtensor.parallel import collectives
from moe_dtensor.parallel.collectives import Borders, token_borders
from moe_dtensor.parallel.lending import Lending, build_lending
from moe_dtensor.parallel.peers import install_peers


class AllGather:
    """Bring all tokens to every rank, let each run its own experts on them, sum what comes back.

    No counts are exchanged, and the K outputs of a token are summed before they travel. Tokens come in while the
    router chooses.

    Args:
        borders: of the axis that shares the experts.
        inner: what runs the experts on the tokens that are together then.
        shared_inside: whether that runs the shared expert too. Else it works on the tokens at hand, while the others'
            sums travel.
        lending: in place of ``inner``: divides the copies among ranks that lend each other experts.
    """

    def __init__(
        self,
        borders: Borders,
        inner: Dispatch = run_experts,
        *,
        shared_inside: bool,
        lending: Lending | None = None,
    ) -> None:
        self.borders = borders
        self.inner = inner
        self.shared_inside = shared_inside
        self.lending = lending

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_TD: Tensor, route: Route
    ) -> tuple[Tensor, Tensor]:
        """``(T, D)`` of a rank's own tokens in and out; and the record."""
        borders, inside = self.borders, shared if self.shared_inside else None
        all_TD = borders.enter(x_TD)
        gate_TK, expert_TK, record_R = route()
        gates, ids = borders.enter(gate_TK), borders.enter_data(expert_TK)
        if self.lending is None:
            # Vectors are waited for first. So in the backward pass gates go first: the router needs no more.
            entered = all_TD(), gates(), ids(), record_R
            y_TD, _ = self.inner(experts, inside, entered[0], lambda: entered[1:])
        else:
            # Lent weights come before vectors and gates. So in the backward pass those go first.
            divided = self.lending(experts, ids())
            together_TD = all_TD()
            y_TD = divided(together_TD, gates())
            y_TD = y_TD if inside is None else y_TD + inside(together_TD)
        leaving = borders.leave(y_TD)
        apart_TD = shared(x_TD) if shared is not None and not self.shared_inside else None
        return leaving() if apart_TD is None else leaving() + apart_TD, record_R


class OneSided:
    """Experts' kernels read the tokens of all ranks out of their memory, and write each token's sum to its rank: what
    :class:`AllGather` sends, without collectives of tokens. Gates and ids are gathered; they are small.

    The backend ``reference`` has no kernels: tokens are gathered.

    Args:
        borders: of the axis that shares the experts.
    """

    def __init__(self, borders: Borders) -> None:
        self.gathered = AllGather(borders, shared_inside=False)
        self.group = install_peers(borders.axis)

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_TD: Tensor, route: Route
    ) -> tuple[Tensor, Tensor]:
        """``(T, D)`` of a rank's own tokens in and out; and the record."""
        if choose_backend(experts.backend, x_TD, experts.local_weight("w_up")) == "reference":
            return self.gathered(experts, shared, x_TD, route)
        borders = self.gathered.borders
        gate_TK, expert_TK, record_R = route()
        gates, ids = borders.enter(gate_TK), borders.enter_data(expert_TK)
        y_TD = experts(x_TD, gates(), ids(), group=self.group)
        return y_TD if shared is None else y_TD + shared(x_TD), record_R


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
        self, experts: Experts, shared: FeedForward | None, x_TD: Tensor, route: Route
    ) -> tuple[Tensor, Tensor]:
        """``(T, D)`` of a rank's own tokens in and out; and the record."""
        gate_TK, expert_TK, record_R = route()
        position_TR, sent_R2 = self._positions(experts, expert_TK)
        received_R2 = torch.empty_like(sent_R2)
        collectives.all_to_all_counts(received_R2, sent_R2, self.axis)
        counts_2R2 = torch.stack([sent_R2, received_R2]).tolist()
        sent, received = ([tokens for tokens, _ in counts_R2] for counts_R2 in counts_2R2)
        copies = sum(copies for _, copies in counts_2R2[1])

        def start(x_TC: Tensor) -> collectives.Pending:
            return collectives.start_all_to_all(permute_to(x_TC, position_TR, sum(sent)), self.axis, sent, received)

        # Ids travel beside the gates, in their dtype: whole numbers far below its precision.
        choices_N2K = start(torch.cat([gate_TK, expert_TK.to(gate_TK.dtype)], 1))
        x_ND = start(x_TD)
        shared_TD = None if shared is None else shared(x_TD)
        gate_NK, expert_NK = choices_N2K().chunk(2, 1)
        y_ND = experts(x_ND(), gate_NK, expert_NK.detach().long(), rows=copies)
        y_TD = unpermute_from(collectives.all_to_all(y_ND, self.axis, received, sent), position_TR)
        return y_TD if shared_TD is None else y_TD + shared_TD, record_R

    def _positions(self, experts: Experts, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Where each token's row for each rank lies, ``(T, R)`` int32, -1 for none; and how many tokens and copies
        each rank is sent, ``(R, 2)``. Rows are sorted by rank, then by token."""
        ranks = self.axis.size()
        owner_TK = expert_TK.div(experts.num_experts // ranks, rounding_mode="floor")
        copies_TR = (owner_TK[..., None] == torch.arange(ranks, device=owner_TK.device)).sum(1)
        wanted_RT = (copies_TR > 0).T
        row_RT = wanted_RT.flatten().cumsum(0).view(wanted_RT.shape) - 1
        position_TR = row_RT.where(wanted_RT, -1).T.int().contiguous()
        return position_TR, torch.stack([wanted_RT.sum(1), copies_TR.sum(0)], 1)


class Scattered:
    """For tokens that are replicated over an axis: each rank dispatches a shard of them, then results are gathered.

    The shared expert works on all of them, by borders of its own.

    Args:
        axis: whose ranks hold the same.
        inner: dispatch of a shard.
    """

    def __init__(self, axis: DeviceMesh, inner: Dispatch) -> None:
        self.axis = axis
        self.inner = inner

    def __call__(
        self, experts: Experts, shared: FeedForward | None, x_TD: Tensor, route: Route
    ) -> tuple[Tensor, Tensor]:
        """``(T, D)`` of all tokens in and out; and the record."""
        tokens = len(x_TD)
        more = -tokens % self.axis.size()

        def scatter(x_TC: Tensor, fill: int = 0) -> Tensor:
            padded_TC = torch.nn.functional.pad(x_TC, (0, 0, 0, more), value=fill)
            return collectives.scatter(padded_TC, self.axis, 0)

        gate_TK, expert_TK, record_R = route()
        shards = scatter(gate_TK), scatter(expert_TK, fill=-1), record_R
        y_UD, _ = self.inner(experts, None, scatter(x_TD), lambda: shards)
        y_TD = collectives.gather_replicated(y_UD, self.axis, 0)[:tokens]
        return y_TD if shared is None else y_TD + shared(x_TD), record_R


def build_dispatch(config: Config, mesh: DeviceMesh) -> tuple[Dispatch, bool]:
    """The dispatch for ``mesh.experts`` and ``mesh.dispatch``, and whether the shared expert works inside it on tokens
    that tp has brought together (else it has borders of its own)."""
    tp, place = mesh["tp"], config.mesh.experts
    if tp.size() == 1 and place in ("tp", "tp_hidden"):
        return run_experts, True
    if choose_dispatch(config) == "all_to_all" and expert_ranks(config) > 1:
        inner: Dispatch = AllToAll(expert_axis(config, mesh))
        # Over dp alone, tp ranks hold the same experts and stay among themselves.
        repeated = tp.size() > 1 and not config.mesh.sequence_parallel and place != "dp"
        return Scattered(tp, inner) if repeated else inner, False
    if choose_dispatch(config) == "one_sided" and expert_ranks(config) > 1:
        axis = expert_axis(config, mesh)
        return OneSided(Borders(axis, 0) if place == "dp" else token_borders(config, axis)), False
    lending = build_lending(config, mesh)
    if place in ("dp", "dp_tp"):
        both = expert_mesh(config, mesh)
        dp = both[both.mesh_dim_names[-2]]  # type: ignore[index]
    if place == "dp":
        return AllGather(Borders(dp, 0), shared_inside=False, lending=lending), False
    if place == "dp_tp":
        inside = AllGather(Borders(dp, 0), shared_inside=False, lending=lending)
        return AllGather(token_borders(config, tp), inside, shared_inside=True), True
    return AllGather(token_borders(config, tp), shared_inside=True, lending=lending), True
