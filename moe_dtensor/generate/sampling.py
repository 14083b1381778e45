"""The next token of each sequence. B sequences, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
