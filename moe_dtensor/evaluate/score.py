"""Log-likelihoods of tokens after others, on a mesh. B sequences, S positions, V held ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.data.loader import IGNORED
from moe_dtensor.generate.batch import Model
from moe_dtensor.kernels.cross_entropy import held_ids
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel import collectives


@dataclass(frozen=True)
class Request:
    """Tokens of which the last are scored, each after all before it."""

    tokens: tuple[int, ...]
    """At least one more than are scored."""
    scored: int


@dataclass(frozen=True)
class Score:
    """What a request gets."""

    log_likelihood: float
    """Summed over the scored tokens, in nats."""
    greedy: bool
    """Whether each scored token is the likeliest where it stands."""


Done = Callable[[int], None]
"""Called with the number of requests that were scored since the last call."""


@torch.no_grad()
def score(model: Model, requests: Sequence[Request], batch_size: int, done: Done | None = None) -> list[Score]:
    """Score requests of any lengths. Called by all ranks together, with the same arguments.

    Requests of like length make a batch, of which dp ranks take a share each. A batch has one shape on all ranks,
    filled up with a request of no meaning where it does not divide.

    Args:
        model: in evaluation mode.
        requests: in any order.
        batch_size: requests in one forward pass of all ranks together.

    Returns:
        A score of each request, the same on every rank.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), i))
    found: dict[int, Score] = {}
    with watched_head(model.part, model.mesh["tp"]) as likeliest:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            for index, (log_likelihood, greedy) in zip(chosen, _batch(model, requests, chosen, likeliest), strict=True):
                found[index] = Score(log_likelihood, bool(greedy))
            if done:
                done(len(chosen))
    return [found[i] for i in range(len(requests))]


def _batch(
    model: Model, requests: Sequence[Request], chosen: Sequence[int], likeliest: list[Tensor]
) -> list[list[float]]:
    """Log-likelihood and greediness of the chosen requests."""
    dp = model.mesh["dp"]
    each = -(-len(chosen) // dp.size())
    filled = [*chosen, *[chosen[0]] * (each * dp.size() - len(chosen))]
    own = filled[dp.get_local_rank() * each :][:each]
    length = max(len(requests[i].tokens) for i in chosen) - 1
    # Filled up behind, where causal attention does not look.
    tokens_BS = torch.zeros(each, length, dtype=torch.int64)
    labels_BS = torch.full((each, length), IGNORED)
    for row, index in enumerate(own):
        tokens = torch.tensor(requests[index].tokens)
        stop, scored = len(tokens) - 1, requests[index].scored
        tokens_BS[row, :stop] = tokens[:-1]
        labels_BS[row, stop - scored : stop] = tokens[1:][stop - scored :]
    device = model.device
    likeliest.clear()
    loss_B = model.part(tokens_BS.to(device), labels_BS.to(device), sequence_B=torch.tensor(own, device=device))
    (greedy_B,) = likeliest
    scores_B2 = torch.stack([-loss_B, greedy_B.to(loss_B.dtype)], 1)
    everyone = collectives.gather_replicated(scores_B2, dp, 0) if dp.size() > 1 else scores_B2
    return everyone[: len(chosen)].tolist()


@contextmanager
def watched_head(part: Transformer, tp: DeviceMesh) -> Iterator[list[Tensor]]:
    """While it is open losses are summed in float64, and the list gets ``(B,)`` of each forward pass: whether every
    target of a sequence is its likeliest token."""
    token_loss, likeliest = part.token_loss, []

    def watch(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        hit_BS = likeliest_ids(logits_BSV, part, tp) == labels_BS
        likeliest.append((hit_BS | (labels_BS == IGNORED)).all(1))
        return token_loss(logits_BSV, labels_BS).to(torch.float64)

    part.token_loss = watch
    try:
        yield likeliest
    finally:
        part.token_loss = token_loss


def likeliest_ids(logits_BSV: Tensor, part: Transformer, tp: DeviceMesh) -> Tensor:
    """The likeliest id at each position ``(B, S)``, of equally likely ones the lowest; padding left out."""
    columns = held_ids(part.vocab_size, part.first_row, logits_BSV.shape[-1])
    if columns:
        value_BS, id_BS = logits_BSV[..., :columns].max(-1)
        id_BS = id_BS + part.first_row
    else:
        value_BS = torch.full(logits_BSV.shape[:-1], -torch.inf, dtype=logits_BSV.dtype, device=logits_BSV.device)
        id_BS = torch.full_like(value_BS, part.vocab_size, dtype=torch.int64)
    if tp.size() == 1:
        return id_BS
    # float64 holds every value and id as they are.
    both_1BS2 = torch.stack([value_BS.double(), id_BS.double()], -1)[None]
    value_RBS, id_RBS = collectives.gather_replicated(both_1BS2, tp, 0).unbind(-1)
    return id_RBS.where(value_RBS == value_RBS.amax(0), torch.inf).amin(0).long()
