"""From one stage of a run to the next: the same weights in a trainer of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from moe_dtensor.config.schema import Config
from moe_dtensor.train.build import Trainer


def same_sizes(one: Config, other: Config) -> bool:
    """Whether a trainer of ``one`` can take the steps of ``other``."""
    return (one.training, one.moe) == (other.training, other.moe)


@dataclass(frozen=True)
class Kept:
    """This rank's part of a trainer's state, in host memory."""

    tensors: dict[str, Tensor]
    schedule: dict[str, Any]
    rng: Tensor


def keep(trainer: Trainer) -> Kept:
    """Copy what a trainer of other sizes needs to go on, bit for bit."""
    tensors = {name: _local(value).detach().cpu().clone() for name, value in _tensors(trainer).items()}
    return Kept(tensors, trainer.schedule.state_dict(), torch.get_rng_state())


@torch.no_grad()
def give(trainer: Trainer, kept: Kept) -> None:
    """Put what :func:`keep` took into a trainer on the same mesh."""
    for name, value in _tensors(trainer).items():
        _local(value).copy_(kept.tensors[name])
    trainer.schedule.load_state_dict(kept.schedule)
    torch.set_rng_state(kept.rng)


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The live tensors of model, optimizer and balancing by name."""
    found = {f"model.{n}": v for part in trainer.parts for n, v in get_model_state_dict(part).items()}
    found |= {f"optimizer.{n}": v for n, v in trainer.optimizers.state_dict().items()}
    found |= {f"balance.{n}": v for n, v in trainer.balance.state_dict().items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
