"""Compares what several ranks hold alike: a rank that computes something else than the others is named.

Alike are, on the ranks of one tp group, the parameters that tp does not split (norms, routers, shared key/value heads)
with their moments, and on all ranks the routers' balance. What FSDP or tp splits is held once and has no replica; the
copies of ``mesh.dp_replicate`` and of groups that share experts are not compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.errors import RunError
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.placement import build_table, find_row
from moe_dtensor.train.build import Trainer

_PIECE = 1 << 22


def check_replicas(trainer: Trainer, step: int) -> None:
    """Compare the replicas of all ranks by a hash of 64 bits; called by all ranks together.

    Raises:
        RunError: they differ; on every rank, naming the ranks that differ from most.
    """
    names, hashes = zip(*[(name, hash_bits(tensor)) for name, tensor in replicas(trainer)], strict=True)
    joined = torch.stack(hashes)
    own = torch.stack([torch.sum(joined[:-2] * _odd(len(names) - 2, joined.device)), hash_bits(joined[-2:])])
    # A sum of rows, of which each rank fills its own.
    all_R2 = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64, device=own.device)
    all_R2[dist.get_rank()] = own
    dist.all_reduce(all_R2)
    if not (odd := odd_ones(all_R2.tolist(), trainer.config.mesh.tp)):
        return
    by_name = [dict(zip(names, joined.tolist(), strict=True))]
    every: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, by_name[0])
    parts = []
    for rank, peer in odd.items():
        differs = [name for name, value in every[rank].items() if every[peer].get(name, value) != value]
        parts.append(f"rank {rank} differs from rank {peer} in {', '.join(differs[:3]) or 'its balance'}")
    raise RunError(
        f"after step {step} replicas are not alike: {'; '.join(parts)}.",
        "A device or its memory may be broken: look at that rank's host, and resume from the last checkpoint.",
        common=True,
    )


def replicas(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds alike with its tp group, by name; the balance of all ranks last."""
    plan = build_table(trainer.config)
    alike = {
        name: parameter
        for part in trainer.parts
        for name, parameter in part.named_parameters()
        if find_row(plan, name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")).tp is None
    }
    for name, parameter in alike.items():
        yield name, local_part(parameter)
        for optimizer in trainer.optimizers:
            if parameter in optimizer.state:
                for moment, value in optimizer.state[parameter].items():
                    if moment != "step":
                        yield f"{moment} of {name}", local_part(value)
    yield "the balance's bias", trainer.balance.bias_LE
    yield "the balance's load", trainer.balance.previous_load_LE


def hash_bits(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's bytes and their order, int64 scalar on its device: a sum of odd multiples, modulo 2^64."""
    raw = tensor.detach().contiguous().view(-1)
    size = raw.element_size()
    words = raw.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE].to(torch.int64)
        total = total * 31 + torch.sum(piece * _odd(len(piece), piece.device))
    return total


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd numbers that look like chance, one for each place."""
    place = torch.arange(count, dtype=torch.int64, device=device)
    return (place * 0x9E3779B97F4A7C1 ^ (place >> 3) * 0x5851F42D4C957F2D) * 2 + 1


def odd_ones(hashes: list[list[int]], tp: int) -> dict[int, int]:
    """Ranks whose hash is not that of most of those alike, each with a rank of the most; empty if all are alike."""
    found: dict[int, int] = {}
    groups = [(0, range(start, start + tp)) for start in range(0, len(hashes), tp)] + [(1, range(len(hashes)))]
    for which, ranks in groups:
        values = [hashes[rank][which] for rank in ranks]
        most = Counter(values).most_common(1)[0][0]
        peer = ranks[values.index(most)]
        found |= {rank: peer for rank, value in zip(ranks, values, strict=True) if value != most and rank not in found}
    return found
