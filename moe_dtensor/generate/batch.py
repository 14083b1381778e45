"""A batch of prompts continued on a mesh: every rank takes the same steps. How each next token is drawn.

B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.schema import Config
from moe_dtensor.generate.cache import Slots
from moe_dtensor.generate.decoder import open_decoder, whole_vocabulary
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel import collectives


@dataclass(frozen=True)
class Model:
    """A model to generate with, on this rank."""

    part: Transformer
    config: Config
    """Resolved; pp = 1 and no sequence parallelism."""
    mesh: DeviceMesh
    device: torch.device


@dataclass(frozen=True)
class Completion:
    """Of one prompt."""

    ids: list[int]
    """New tokens, without the one that ended them."""
    ended: bool
    """Whether an end token came, before there were too many."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """What logits are divided by. 0: always the likeliest."""
    top_k: int = 0
    """Draw among so many of the likeliest. 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest that together have this probability (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0


OnTokens = Callable[[list[int]], None]
"""Called after each step with the newest id of each sequence of this dp rank, -1 where it has ended."""


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    ends: Collection[int],
    *,
    first_number: int = 0,
    on_tokens: OnTokens | None = None,
    check: bool = False,
) -> tuple[list[Completion], float]:
    """Continue prompts of any lengths. Called by all ranks together, with the same arguments.

    dp ranks share the prompts; prompts of no meaning fill up the last share, so that all take the same steps. They
    stop together, when every prompt has ended.

    Args:
        prompts: ids, at least one each.
        max_tokens: new tokens of each at most.
        ends: ids that end a completion.
        first_number: number of the first prompt, for its stream of random numbers.
        on_tokens: see :data:`OnTokens`.
        check: compare every step's logits with those of a full forward pass.

    Returns:
        A completion of each prompt, on every rank; and with ``check`` the largest difference of logits over their
        largest, else 0.
    """
    dp, own = model.mesh["dp"], _own_prompts(model, prompts)
    numbers = range(first_number + dp.get_local_rank() * len(own), first_number + (dp.get_local_rank() + 1) * len(own))
    longest = max(map(len, prompts))
    slots = Slots(torch.tensor([longest - len(p) for p in own], device=model.device), longest + max_tokens)
    padded = [[0] * (longest - len(p)) + list(p) for p in own]
    real = torch.tensor([number < first_number + len(prompts) for number in numbers], device=model.device)
    sampler, end_E = Sampler(sampling, numbers), torch.tensor(sorted(ends), device=model.device)
    next_BS, active_B = torch.tensor(padded, device=model.device), real.clone()
    new: list[Tensor] = []
    logits: list[Tensor] = []
    with open_decoder(model.part, model.config, model.mesh["tp"], slots) as decode:
        for _ in range(max_tokens):
            logits_BV = decode(next_BS)
            if check:
                logits.append(logits_BV)
            id_B = sampler(logits_BV)
            new.append(id_B.where(active_B, -1))
            active_B = active_B & ~torch.isin(id_B, end_E)
            if on_tokens:
                on_tokens(new[-1].tolist())
            # Those that have ended go on unseen, in step with the others.
            next_BS = id_B[:, None]
            if not bool(collectives.all_reduce(active_B.any().long(), dp)):
                break
    new_BS = torch.stack(new, 1)
    error = _check(model, own, new_BS, torch.stack(logits, 1), slots.total) if check else 0.0
    new_BS = torch.nn.functional.pad(new_BS, (0, max_tokens - new_BS.shape[1]), value=-1)
    everyone = collectives.gather_replicated(new_BS, dp, 0) if dp.size() > 1 else new_BS
    return [_completion(row, ends) for row in everyone[: len(prompts)].tolist()], error


def _own_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """This dp rank's share; the last ones filled up."""
    dp = model.mesh["dp"]
    each = -(-len(prompts) // dp.size())
    everyone = [*prompts, *[prompts[0]] * (each * dp.size() - len(prompts))]
    return everyone[dp.get_local_rank() * each :][:each]


def _completion(row: list[int], ends: Collection[int]) -> Completion:
    ids = [token for token in row if token >= 0]
    ended = bool(ids) and ids[-1] in ends
    return Completion(ids[:-1] if ended else ids, ended)


@torch.no_grad()
def _check(model: Model, prompts: Sequence[Sequence[int]], new_BS: Tensor, logits_BSV: Tensor, length: int) -> float:
    """How far the steps' logits are from a full forward pass over prompts and completions, over all dp ranks.

    Sequences are filled up behind to ``length``, where causal attention does not look.
    """
    new = [[token for token in row if token >= 0] for row in new_BS.tolist()]
    rows = [[*p, *n] for p, n in zip(prompts, new, strict=True)]
    tokens_BS = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    full_BSV = whole_vocabulary(model.part(tokens_BS), model.config, model.mesh["tp"])
    worst = torch.zeros((), dtype=torch.float64, device=model.device)
    for b, (prompt, made) in enumerate(zip(prompts, new, strict=True)):
        if not made:
            continue
        full_SV = full_BSV[b, len(prompt) - 1 :][: len(made)].double()
        differs = (logits_BSV[b, : len(made)].double() - full_SV).abs().max() / full_SV.abs().max()
        worst = worst.maximum(differs)
    return float(collectives.all_reduce(worst, model.mesh["dp"], "max"))


class Sampler:
    """Draws with a stream of its own for each prompt: what a prompt gets depends neither on its batch nor on the mesh.

    Args:
        sampling: how.
        numbers: of the prompts, one for each sequence.
    """

    def __init__(self, sampling: Sampling, numbers: range) -> None:
        self.sampling = sampling
        self.streams = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in numbers]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Ids ``(B,)``; of equally likely ones the lower comes first."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        drawn_B = torch.tensor([float(torch.rand((), generator=g, dtype=torch.float64)) for g in self.streams])
        return pick(logits_BV, self.sampling, drawn_B.to(logits_BV.device))


def pick(logits_BV: Tensor, sampling: Sampling, drawn_B: Tensor) -> Tensor:
    """The id at which the sum of probabilities, the likeliest first, passes a number from 0 to 1; ``(B,)``."""
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    sorted_BV, id_BV = logits_BV.to(wide).sort(dim=-1, descending=True, stable=True)
    p_BV = (sorted_BV / sampling.temperature).softmax(-1)
    if sampling.top_k:
        p_BV[:, sampling.top_k :] = 0
    # What is before an id, itself not counted: the one that passes the share is still in.
    p_BV = p_BV.where(p_BV.cumsum(-1) - p_BV < sampling.top_p * p_BV.sum(-1, keepdim=True), 0)
    sum_BV = p_BV.cumsum(-1)
    reached_BV = sum_BV <= drawn_B[:, None].to(wide) * sum_BV[:, -1:]
    last_B1 = (p_BV > 0).sum(-1, keepdim=True) - 1
    return id_BV.gather(-1, reached_BV.sum(-1, keepdim=True).minimum(last_B1)).squeeze(-1)
