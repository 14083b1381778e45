"""The router: which experts, and with what weight; and its record, a vector of sums over tokens, which add up over
microbatches and ranks.

B sequences, S positions, D width, E experts, K choices, G routing groups, T tokens of a group, R numbers of a record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import expert_takes
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.router import router_logits, router_statistics, top_k_gates
from moe_dtensor.layers.assignment import Sinkhorn, TopK, build_assignment
from moe_dtensor.layers.balance import (
    AddLoss,
    balance_loss,
    chosen_mask,
    keep_groups,
    within_capacity,
    z_loss,
)
from moe_dtensor.layers.tokens import Tokens, uniform_noise
from moe_dtensor.layers.weights import Layer

NOISE_STREAM = 1 << 40
"""Where the streams of the router's noise begin, far from those of forced assignments."""


class Scores(NamedTuple):
    """What the router thinks of a rank's tokens."""

    logits_TE: Tensor
    lead: tuple[int, int]
    """``(B, S)`` of those tokens."""
    whole: Callable[[], Tensor] | None
    """Waits for the logits of the whole microbatch ``(B, S, E)``, without gradient; to be called once. None: the choice
    needs no others than those at hand."""


class Routing(NamedTuple):
    """What the router decided for a rank's tokens."""

    gate_BSK: Tensor
    """Weights, in at least float32."""
    expert_BSK: Tensor
    """Expert ids, int64; -1 where there is no copy: dropped, or not taken."""
    record_R: Tensor
    """See :func:`pack_record`."""


class Router(Layer):
    """Scores every token against every expert, chooses K, and weights them.

    Scores are computed in at least float32. ``gather_tokens`` begins to bring a microbatch's tokens together,
    ``(B, S, ...)``, and gives what waits for them; ``own_tokens`` takes this module's part back, whole sequences
    or positions of each. Both leave things as they are where all tokens are at hand.

    Args:
        config: resolved.
        layer: index of the block.
    """

    bias: Tensor
    previous_load: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        moe, training = config.moe, config.training
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.model.dim))
        self.logit_bias = nn.Parameter(torch.empty(moe.num_experts)) if moe.router_bias else None
        # The state of balancing: rows of moe_dtensor.model.balance_state.BalanceState, which changes and saves them.
        self.register_buffer("bias", torch.zeros(moe.num_experts), persistent=False)
        self.register_buffer("previous_load", torch.zeros(moe.num_experts), persistent=False)
        self.moe = moe
        self.normalizes = moe.normalize_gates or (moe.score == "softmax" and not moe.score_before_top_k)
        self.assignment = build_assignment(config, layer)
        self.plain = TopK(config, layer)
        self.takes = expert_takes(config)
        self.noise_stream = NOISE_STREAM + 1_000_003 * training.seed + layer
        self.step_tokens = training.global_batch_size * training.seq_len
        self.gather_tokens: Callable[[Tensor], Callable[[], Tensor]] = _at_hand
        self.own_tokens: Callable[[Tensor], Tensor] = _identity

    def score(self, x_BSD: Tensor, tokens: Tokens) -> Scores:
        """Score ``x_BSD``, the held part of the microbatch that ``tokens`` are. What the choice needs of other ranks is
        under way then."""
        lead = (x_BSD.shape[0], x_BSD.shape[1])
        if self.training and self.moe.jitter > 0:
            x_BSD = x_BSD * self._noise(tokens, x_BSD.shape[2]).to(x_BSD.dtype)
        logits_TE = router_logits(x_BSD.flatten(0, 1), self.local_weight("weight"))
        if self.logit_bias is not None:
            logits_TE = logits_TE + self.local_weight("logit_bias").to(logits_TE.dtype)
        if not (self.assignment.over_groups and (self.training or self.assignment.forced)):
            return Scores(logits_TE, lead, None)
        return Scores(logits_TE, lead, self.gather_tokens(logits_TE.detach().unflatten(0, lead)))

    def forward(self, scores: Scores, tokens: Tokens) -> Routing:
        """K experts for each token that was scored, and their weights."""
        logits_TE, lead, moe = scores.logits_TE, scores.lead, self.moe
        ranking_BSE, error = self.rank(scores, tokens)
        gate_TK, expert_TK = self._choose(logits_TE, ranking_BSE.flatten(0, 1))
        gate_BSK, expert_BSK = gate_TK.unflatten(0, lead), expert_TK.unflatten(0, lead)
        chosen_BSE = chosen_mask(expert_BSK, moe.num_experts)
        statistics_4 = router_statistics(logits_TE.detach(), gate_TK.detach())
        sums: dict[str, Tensor | None] = {"sinkhorn_error": error}
        if self.training:
            sums["differs_from_top_k"] = self._differing(logits_TE.detach(), chosen_BSE.flatten(0, 1))
            gate_BSK, sums["balance_loss"] = self._with_losses(gate_BSK, expert_BSK, logits_TE.unflatten(0, lead))
            if moe.capacity_factor > 0:
                kept_BSK = self.keep(gate_BSK.detach(), expert_BSK)
                sums["dropped"] = (~kept_BSK).sum()
                expert_BSK = expert_BSK.where(kept_BSK, -1)
        return Routing(gate_BSK, expert_BSK, pack_record(chosen_BSE.sum((0, 1)), statistics_4, sums))

    def rank(self, scores: Scores, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """What the choice goes by, ``(B, S, E)``, and the sum over tokens of Sinkhorn's error; None without it."""
        if scores.whole is not None:
            return self._rank_groups(scores.whole(), tokens)
        logits_BSE = scores.logits_TE.detach().unflatten(0, scores.lead)
        if self.training or self.assignment.forced:
            ranking_BSE = self.assignment(logits_BSE, Tokens(*map(self.own_tokens, tokens)))
        else:
            ranking_BSE = self.plain.by_logits(logits_BSE)
        return self._limited(ranking_BSE), None

    def _rank_groups(self, logits_BSE: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The same for whole sequences, of which tokens compete in their group."""
        of_groups = Tokens(*(self._in_groups(x[..., None]).squeeze(-1) for x in tokens))
        whole_BSE = self.assignment(self._in_groups(logits_BSE), of_groups).view(logits_BSE.shape)
        ranking_BSE = self.own_tokens(whole_BSE)
        error = self.assignment.row_error(ranking_BSE) if isinstance(self.assignment, Sinkhorn) else None
        return self._limited(ranking_BSE), error

    def keep(self, gate_BSK: Tensor, expert_BSK: Tensor) -> Tensor:
        """Which copies are within the capacity of their expert in their routing group, ``(B, S, K)`` bool."""
        gate_BSK, expert_BSK = self.gather_tokens(gate_BSK)(), self.gather_tokens(expert_BSK)()
        groups = self._in_groups(gate_BSK), self._in_groups(expert_BSK)
        assert self.takes is not None
        kept_GTK = within_capacity(*groups, self.moe.num_experts, self.takes, self.moe.drop_by)
        return self.own_tokens(kept_GTK.view(expert_BSK.shape))

    def _noise(self, tokens: Tokens, width: int) -> Tensor:
        """Of each number of the tokens held, ``(B, S, D)``: from 1 - jitter to 1 + jitter."""
        number_BS = self.own_tokens(tokens.number_BS)
        key_BSD = number_BS[..., None] * width + torch.arange(width, device=number_BS.device)
        return 1 + self.moe.jitter * (2 * uniform_noise(key_BSD, self.noise_stream) - 1)

    def _choose(self, logits_TE: Tensor, ranking_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and ids of the K highest, or of all that are not -inf where tokens go to any number of experts."""
        variable = self.training and self.assignment.variable
        gate_TK, expert_TK = top_k_gates(
            logits_TE,
            logits_TE.shape[1] if variable else self.moe.top_k,
            score=self.moe.score,
            ranking_TE=ranking_TE,
            normalize=self.normalizes,
        )
        if variable:
            taken_TK = ranking_TE.gather(1, expert_TK) > -torch.inf
            gate_TK, expert_TK = gate_TK * taken_TK, expert_TK.where(taken_TK, -1)
        return gate_TK if self.moe.gate_scale == 1 else gate_TK * self.moe.gate_scale, expert_TK

    def _limited(self, ranking_BSE: Tensor) -> Tensor:
        """With the experts' bias, and within the groups of experts that a token may choose from."""
        moe = self.moe
        if moe.selection_bias:
            ranking_BSE = ranking_BSE + self.bias.to(ranking_BSE.dtype)
        if not moe.expert_groups:
            return ranking_BSE
        return keep_groups(ranking_BSE, moe.expert_groups, moe.expert_groups_kept, moe.group_score)

    def _differing(self, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor | None:
        """Tokens whose experts are not those of evaluation; None where that chooses in the same way."""
        if self.assignment.forced or isinstance(self.assignment, TopK):
            return None
        ranking_TE = self._limited(self.plain.by_logits(logits_TE))
        _, plain_TK = top_k_gates(logits_TE, self.moe.top_k, ranking_TE=ranking_TE)
        return (chosen_TE != chosen_mask(plain_TK, self.moe.num_experts)).any(1).sum()

    def _with_losses(self, gate_BSK: Tensor, expert_BSK: Tensor, logits_BSE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gates, which from here on carry the auxiliary losses too, and the balancing one's sum, if it is on."""
        moe = self.moe
        terms: list[Tensor] = []
        balance: Tensor | None = None
        if moe.balance_loss > 0:
            balance = balance_loss(logits_BSE, self._load_of_sets(expert_BSK), moe.score)
            terms.append(balance * moe.balance_loss)
        if moe.z_loss > 0:
            terms.append(z_loss(logits_BSE) * moe.z_loss)
        if terms:
            gate_BSK = AddLoss.apply(gate_BSK, sum(terms[1:], terms[0]) / self.step_tokens)
        return gate_BSK, balance

    def _load_of_sets(self, expert_BSK: Tensor) -> Tensor:
        """Copies by expert in the set that each sequence belongs to of which tokens are held, ``(B, E)``."""
        if self.moe.balance_over == "batch":
            return self.previous_load.expand(len(expert_BSK), -1)
        whole_BSK = self.gather_tokens(expert_BSK)()
        load_BE = chosen_mask(whole_BSK, self.moe.num_experts).sum(1)
        if self.moe.balance_over == "group":
            size = self.moe.group_sequences
            load_BE = load_BE.unflatten(0, (-1, size)).sum(1).repeat_interleave(size, dim=0)
        return self.own_tokens(load_BE[:, None].expand(-1, whole_BSK.shape[1], -1))[:, 0]

    def _in_groups(self, x_BSE: Tensor) -> Tensor:
        """Whole sequences ``(B, S, E)`` as routing groups ``(G, T, E)``."""
        return x_BSE.reshape(-1, self.moe.group_sequences * x_BSE.shape[1], x_BSE.shape[2])


def _at_hand(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x


def _identity(x: Tensor) -> Tensor:
    return x


STATISTICS = {
    "router_entropy": "entropy of the softmax of a token's logits, nats",
    "router_margin": "its highest minus its second highest probability",
    "router_gate_norm": "2-norm of a token's gates",
    "router_z": "square of the logsumexp of its logits (the z-loss without its coefficient)",
    "balance_loss": "load-balancing loss without its coefficient; 0 where it is off",
    "dropped": "copies beyond the capacity, as a share of all copies",
    "differs_from_top_k": "share of tokens whose experts are not those of plain top-k, as in evaluation",
    "sinkhorn_error": "how far a token's row of Sinkhorn's matrix is from its sum of 1",
}
"""Means over the tokens of a step, by the name they have in the metrics."""


class RoutingRecord(NamedTuple):
    """A step's record of all MoE blocks, over all ranks. L MoE blocks, E experts."""

    load_LE: Tensor
    """Copies sent to each expert, float64; exact, and before any is dropped."""
    mean_L: dict[str, Tensor]
    """Of each of :data:`STATISTICS`, ``(L,)`` float64."""


def pack_record(load_E: Tensor, statistics_4: Tensor, sums: dict[str, Tensor | None]) -> Tensor:
    """One vector ``(E + len(STATISTICS),)`` float64 of a microbatch's load and sums.

    Args:
        load_E: copies by expert.
        statistics_4: the first four of :data:`STATISTICS`, as
            :func:`moe_dtensor.kernels.router.router_statistics` gives them.
        sums: others by name; what is missing or None is 0.
    """
    names, experts = list(STATISTICS), len(load_E)
    record_R = load_E.new_zeros(experts + len(names), dtype=torch.float64)
    record_R[:experts] = load_E
    record_R[experts : experts + 4] = statistics_4
    for name, value in sums.items():
        if value is not None:
            record_R[experts + names.index(name)] = value.detach()
    return record_R


def unpack_record(record_LR: Tensor, tokens: int, top_k: int | Tensor) -> RoutingRecord:
    """Sums over a whole step of ``tokens`` tokens, as means; K of all blocks, or of each ``(L,)``."""
    experts = record_LR.shape[1] - len(STATISTICS)
    means = dict(zip(STATISTICS, (record_LR[:, experts:] / tokens).unbind(1), strict=True))
    means["dropped"] = means["dropped"] / top_k
    return RoutingRecord(record_LR[:, :experts], means)
