"""Config → the parts of a training run on this rank; from one stage to the next the same weights in other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.check import check
from moe_dtensor.config.resolve import block_config, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.accumulation import Runner
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.parallel.pipeline import build_runner
from moe_dtensor.train.optimizer import Optimizers, Schedule


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with."""

    config: Config
    """Resolved."""
    mesh: DeviceMesh
    """(dp, pp, tp)."""
    device: torch.device
    parts: list[Transformer]
    """Model parts (pipeline stages) of this rank, in the order of their blocks."""
    runner: Runner
    """Runs forward and backward over a step's microbatches."""
    optimizers: Optimizers
    schedule: Schedule
    balance: BalanceState
    top_k: int | Tensor
    """K of every MoE block, or of each ``(L,)`` where they differ; made once, since a copy to the device waits."""


def build(config: Config, device: torch.device, mesh: DeviceMesh | None = None, *, values: bool = True) -> Trainer:
    """Build all parts over the default process group.

    Args:
        config: resolved, with ``model.vocab_size``.
        device: of this rank.
        mesh: to build on; None makes it.
        values: False leaves parameters and their optimizer's state on meta, to look at names and places.
    """
    if not config.stages:  # else this is one of them, and all were checked together
        check(config, torch.distributed.get_world_size())
    set_determinism(config)
    mesh = mesh or build_mesh(config, device)
    parts = build_parts(config, mesh, device, values=values)
    for part in parts:
        part.train()
    optimizers = Optimizers(parts, config)
    return Trainer(
        config=config,
        mesh=mesh,
        device=device,
        parts=parts,
        runner=build_runner(parts, config, mesh, device),
        optimizers=optimizers,
        schedule=Schedule(optimizers, config),
        balance=BalanceState(config, parts, device),
        top_k=_top_k(config, device),
    )


def _top_k(config: Config, device: torch.device) -> int | Tensor:
    if not config.moe.top_k_by_layer:
        return config.moe.top_k
    return torch.tensor([block_config(config, layer).moe.top_k for layer in sorted(moe_layers(config))], device=device)


def set_determinism(config: Config) -> None:
    """Seed torch, and with ``training.deterministic`` allow only algorithms that repeat bit for bit."""
    torch.manual_seed(config.training.seed)
    torch.use_deterministic_algorithms(config.training.deterministic)


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
    tensors = {name: local_part(value).detach().cpu().clone() for name, value in _tensors(trainer).items()}
    return Kept(tensors, trainer.schedule.state_dict(), torch.get_rng_state())


@torch.no_grad()
def give(trainer: Trainer, kept: Kept) -> None:
    """Put what :func:`keep` took into a trainer on the same mesh."""
    for name, value in _tensors(trainer).items():
        local_part(value).copy_(kept.tensors[name])
    trainer.schedule.load_state_dict(kept.schedule)
    torch.set_rng_state(kept.rng)


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The live tensors of model, optimizer and balancing by name."""
    found = {f"model.{n}": v for part in trainer.parts for n, v in get_model_state_dict(part).items()}
    found |= {f"optimizer.{n}": v for n, v in trainer.optimizers.state_dict().items()}
    found |= {f"balance.{n}": v for n, v in trainer.balance.state_dict().items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
