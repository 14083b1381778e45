"""A batch of prompts continued on a mesh: every rank takes the same steps. B sequences, S positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.schema import Config
from moe_dtensor.generate.cache import Slots
from moe_dtensor.generate.decoder import open_decoder, whole_vocabulary
from moe_dtensor.generate.sampling import Sampler, Sampling
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
