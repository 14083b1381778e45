"""Experts and the mixture. B sequences, S positions, D width, F expert hidden width, G 2 if gated else 1,
E experts, K choices, T tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import GATED, SPLIT_BACKWARD, block_config
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.experts.mlp import expert_mlp
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.router import Router
from moe_dtensor.layers.tokens import Tokens
from moe_dtensor.layers.weights import Layer, Linear


class Experts(Layer):
    """The expert MLPs, as grouped GEMMs over stacked weights. May hold a run of all experts from ``first_expert``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        moe, dim = config.moe, config.model.dim
        gates = 2 if config.model.activation in GATED else 1
        self.w_up = nn.Parameter(torch.empty(moe.num_experts, gates, moe.hidden_dim, dim))
        self.w_down = nn.Parameter(torch.empty(moe.num_experts, dim, moe.hidden_dim))
        self.up_bias = nn.Parameter(torch.empty(moe.num_experts, gates, moe.hidden_dim)) if moe.expert_bias else None
        self.activation = config.model.activation
        self.backend = moe.backend
        self.rows = moe.rows
        self.keep_rows = moe.keep_rows
        self.float8 = moe.expert_dtype == "float8"
        self.split_backward = config.mesh.pp > 1 and config.pipeline.schedule in SPLIT_BACKWARD
        self.gate_on_input = moe.gate_on == "input"
        self.first_expert = 0
        self.num_experts = moe.num_experts

    def weight_names(self) -> list[str]:
        """Of the parameters that it has."""
        return ["w_up", "w_down"] if self.up_bias is None else ["w_up", "w_down", "up_bias"]

    def forward(
        self,
        x_TD: Tensor,
        gate_TK: Tensor,
        expert_TK: Tensor,
        rows: int | None = None,
        weights: dict[str, Tensor] | None = None,
        group: str | None = None,
    ) -> Tensor:
        """The gate-weighted sum of the held experts' outputs, ``(T, D)``; an id of -1 is no copy.

        Args:
            rows: copies for the held experts, where the caller knows. None: ``moe.rows`` says how to tell.
            weights: those of :meth:`weight_names` in place of its own; ids then count from 0 among them, and they are
                a part of all the weights that the ranks have together.
            group: of ranks whose tokens come together in the kernels
                (:func:`moe_dtensor.kernels.experts.mlp.expert_mlp`).
        """
        if weights is None:
            weights = {name: self.local_weight(name) for name in self.weight_names()}
            first_expert, num_experts = self.first_expert, self.num_experts
        else:
            first_expert, num_experts = 0, self.num_experts + len(weights["w_up"])
        if self.gate_on_input:  # K = 1; 0 where the copy is not for this module
            x_TD, gate_TK = x_TD * gate_TK.to(x_TD.dtype), torch.ones_like(gate_TK)
        return expert_mlp(
            x_TD,
            weights["w_up"],
            weights["w_down"],
            gate_TK,
            expert_TK,
            activation=self.activation,
            backend=self.backend,
            first_expert=first_expert,
            rows=self.rows if rows is None else rows,
            split_backward=self.split_backward,
            num_experts=num_experts,
            up_bias_EGF=weights.get("up_bias"),
            group=group,
            keep_rows=self.keep_rows,
            float8=self.float8,
        )


class SharedExpert(FeedForward):
    """A feed-forward that every token visits; with ``moe.shared_gate`` weighted by ``sigmoid(w x)`` (Qwen2-MoE)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.model.dim, config.moe.shared_hidden_dim, config.model.activation)
        self.token_gate = Linear(config.model.dim, 1) if config.moe.shared_gate else None

    def compute(self, x: Tensor) -> Tensor:
        """What the held hidden units give, ``(..., D)`` in and out."""
        y = super().compute(x)
        return y if self.token_gate is None else self.token_gate(x).sigmoid() * y


Route = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Waits for what the choice goes by, and makes it: gates and ids ``(T, K)``, and the record. To be called once."""
Dispatch = Callable[[Experts, FeedForward | None, Tensor, Route], tuple[Tensor, Tensor]]
"""Experts, the shared expert, tokens ``(T, D)`` in any order, and their route, to output ``(T, D)`` and record."""


def run_experts(experts: Experts, shared: FeedForward | None, x_TD: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """Experts and shared expert on the tokens at hand: all there is to dispatch on one device."""
    gate_TK, expert_TK, record_R = route()
    y_TD = experts(x_TD, gate_TK, expert_TK)
    return y_TD if shared is None else y_TD + shared(x_TD), record_R


class MoE(Layer):
    """A mixture of experts in place of a feed-forward, dropless unless ``moe.capacity_factor`` says otherwise.

    ``dispatch`` brings tokens to experts and sums what comes back; where experts live is its business alone. The
    biases of the experts' outputs stay with the tokens: each token adds those of its experts, by its gates.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        config = block_config(config, layer)
        moe = config.moe
        self.router = Router(config, layer)
        self.experts = Experts(config)
        self.shared = SharedExpert(config) if moe.shared_hidden_dim else None
        self.down_bias = nn.Parameter(torch.empty(moe.num_experts, config.model.dim)) if moe.expert_bias else None
        self.gates_output = moe.gate_on == "output"
        self.dispatch: Dispatch = run_experts

    def forward(self, x_BSD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Output ``(B, S, D)``, and the routing's record (:func:`.router.pack_record`)."""
        scores = self.router.score(x_BSD, tokens)
        chosen: list[tuple[Tensor, Tensor]] = []

        def route() -> tuple[Tensor, Tensor, Tensor]:
            gate_BSK, expert_BSK, record_R = self.router(scores, tokens)
            chosen.append((gate_BSK.flatten(0, 1), expert_BSK.flatten(0, 1)))
            return *chosen[0], record_R

        y_TD, record_R = self.dispatch(self.experts, self.shared, x_BSD.flatten(0, 1), route)
        if self.down_bias is not None:
            y_TD = y_TD + self._bias(*chosen[0], y_TD.dtype)
        return y_TD.unflatten(0, x_BSD.shape[:2]), record_R

    def _bias(self, gate_TK: Tensor, expert_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Each token's gates times its experts' output biases, ``(T, D)``, as one product of dense gates."""
        bias_ED = self.local_weight("down_bias")
        held_TK = expert_TK >= 0
        weight_TK = (gate_TK if self.gates_output else torch.ones_like(gate_TK)).where(held_TK, 0)
        # A column more for choices without a copy.
        dense_TE = weight_TK.new_zeros(len(gate_TK), len(bias_ED) + 1)
        dense_TE = dense_TE.scatter(1, expert_TK.where(held_TK, len(bias_ED)), weight_TK)[:, :-1]
        return dense_TE.to(dtype) @ bias_ED
