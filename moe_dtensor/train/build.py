"""Config → the parts of a training run on this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.check import check
from moe_dtensor.config.resolve import block_config, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.data.corpus import set_vocabulary as set_vocabulary
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.parallel.pipeline import Runner, build_runner
from moe_dtensor.train.optimizer import Optimizers, Schedule, build_optimizers, build_schedulers


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


def build(config: Config, device: torch.device, mesh: DeviceMesh | None = None) -> Trainer:
    """Build all parts over the default process group.

    Args:
        config: resolved, with ``model.vocab_size``.
        device: of this rank.
        mesh: to build on; None makes it.
    """
    if not config.stages:  # else this is one of them, and all were checked together
        check(config, torch.distributed.get_world_size())
    set_determinism(config)
    mesh = mesh or build_mesh(config, device)
    parts = build_parts(config, mesh, device)
    for part in parts:
        part.train()
    optimizers = build_optimizers(parts, config)  # type: ignore[arg-type]
    return Trainer(
        config=config,
        mesh=mesh,
        device=device,
        parts=parts,
        runner=build_runner(parts, config, mesh, device),
        optimizers=optimizers,
        schedule=build_schedulers(optimizers, config),
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
