"""A small model, and a run of it: what the tests of checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.schema import Checkpoint, Config, Training
from moe_dtensor.train.optimizer import Optimizers, Schedule

NAMES = ("layers.0.up.weight", "layers.0.norm.weight", "layers.1.up.weight", "layers.1.norm.weight")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 6, bias=False)
        self.norm = nn.RMSNorm(12)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.up(self.norm(x_TD)).repeat(1, 2)


class Stage(nn.Module):
    """Blocks ``first``..``last``-1 of a two-block model."""

    def __init__(self, first: int = 0, last: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block() for i in range(first, last)})
        generator = torch.Generator().manual_seed(0)
        values = {
            name: torch.randn(shape, generator=generator)
            for name, shape in zip(NAMES, [(6, 12), (12,)] * 2, strict=True)
        }
        for name, parameter in self.named_parameters():
            parameter.data.copy_(values[name])


class Position:
    """A loader's state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"batch": 0, "order": [3, 1, 2]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Balance:
    """What routers carry from step to step, alike on every rank."""

    def __init__(self) -> None:
        self.bias = torch.zeros(2, 3)
        self.load = torch.zeros(2, 3, dtype=torch.float64)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.bias += torch.rand(2, 3, generator=generator)
        self.load.copy_(torch.randint(0, 2**40, (2, 3), generator=generator))

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self.bias, "previous_load": self.load}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bias.copy_(state_dict["bias"])
        self.load.copy_(state_dict["previous_load"])


@dataclass
class Rest:
    """Of a run, what is not its model."""

    optimizers: Any
    schedule: Any
    position: Position
    balance: Balance


def config_of(**checkpoint: Any) -> Config:
    return Config(training=Training(steps=100), checkpoint=Checkpoint(**checkpoint))


def shard(stage: nn.Module, dp: int, pp: int, tp: int) -> None:
    """FSDP over dp; ``up.weight`` split over tp by rows, norms replicated on tp."""
    mesh = init_device_mesh("cpu", (dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))
    for name, module in list(stage.named_modules()):
        if isinstance(module, nn.Linear | nn.RMSNorm):
            placement = Shard(0) if name.endswith("up") else Replicate()
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh["tp"], [placement]))
    for key, block in stage.layers.items():
        stage.layers[key] = checkpoint_wrapper(block)
        # tp splits rows and dp columns: two splits of one dim would be a strided shard.
        fully_shard(stage.layers[key], mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(p.ndim - 1))
    fully_shard(stage, mesh=mesh["dp"])


def run_of(folder: Path, parts: list[nn.Module], config: Config, **more: Any) -> tuple[CheckpointManager, Rest]:
    optimizers = Optimizers(parts, config)
    rest = Rest(optimizers, Schedule(optimizers, config), Position(), Balance())
    state = (rest.optimizers, rest.schedule, rest.position, rest.balance)
    manager = CheckpointManager(folder, config, parts, *state, **more)
    return manager, rest


def train_step(parts: list[nn.Module], rest: Rest, seed: int) -> None:
    """A step on gradients that depend on the parameter's name only, not on the mesh."""
    for part in parts:
        for name, parameter in part.named_parameters():
            index = NAMES.index(name.replace("_checkpoint_wrapped_module.", ""))
            full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed * 10 + index))
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.grad = full
    rest.optimizers.step()
    rest.optimizers.zero_grad()
    rest.schedule.step()
    rest.position.state["batch"] += 1
    rest.balance.step(seed)


def full_state(manager: CheckpointManager) -> dict[str, torch.Tensor]:
    state = manager._tensors()
    flat = {**state["model"], **state["optimizer"], **state["balance"]}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in flat.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def trained(folder: Path, steps: int, **checkpoint: Any) -> tuple[CheckpointManager, tuple[list[nn.Module], Rest]]:
    """A plain run of one process that saved after each step."""
    parts: list[nn.Module] = [Stage()]
    manager, rest = run_of(folder, parts, config_of(**checkpoint))
    for step in range(1, steps + 1):
        train_step(parts, rest, step)
        manager.save(step)
    return manager, (parts, rest)
