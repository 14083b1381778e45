"""A process as one rank after the other of a fake world, and what they tell rank 0 of a checkpoint."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dtensor.checkpoint.planner import Layout, Outline, PlanKeeper, Told
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import build_corpus
from moe_dtensor.train.build import Trainer, build, set_vocabulary


@contextmanager
def member(config: Config, rank: int) -> Iterator[None]:
    """As a rank of a fake world; at the end there is none."""
    mesh = config.mesh
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.dp * mesh.pp * mesh.tp)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ready(config: Config) -> Config:
    """Resolved, with random data; a vocabulary that the config names stays."""
    config = replace(config, data=replace(config.data, corpus="random"))
    resolved = resolve(config, dist.get_world_size())
    return set_vocabulary(resolved, build_corpus(resolved))


def saved_state(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What a checkpoint saves of it."""
    model = {name: value for part in trainer.parts for name, value in get_model_state_dict(part).items()}
    rng = {f"rank_{dist.get_rank()}_of_{dist.get_world_size()}.cpu": torch.get_rng_state()}
    balance = trainer.balance.state_dict()
    return {"model": model, "optimizer": trainer.optimizers.state_dict(), "balance": balance, "rng": rng}


def told_by_stage(config: Config) -> dict[int, Told]:
    """What the first rank of each pipeline rank but the first's tells, by its rank."""
    told = {}
    for rank in range(config.mesh.tp, config.mesh.pp * config.mesh.tp, config.mesh.tp):
        with member(config, rank):
            planner = PlanKeeper().planner()
            planner.set_up_planner(saved_state(build(ready(config), torch.device("cpu"), values=False)))
            told[rank] = planner.create_local_plan().planner_data
    return told


def told_by_all(config: Config, first: dict[int, Told]) -> list[Told]:
    """What every rank tells, worked out from what the first rank of each pipeline rank does."""
    mesh = config.mesh
    world = mesh.dp * mesh.pp * mesh.tp
    claims: dict[int, dict[str, Outline]] = defaultdict(dict)
    for start, told in first.items():
        for name, outline in told.tensors.items():
            if not name.startswith("model."):
                continue
            step = f"optimizer.state.{name.removeprefix('model.')}.step"
            number = zlib.crc32(step.encode()) % math.prod(outline.layout.mesh)
            dp, tp = divmod(number, mesh.tp)
            claims[dp * mesh.pp * mesh.tp + start + tp][step] = _scalar("optimizer", step)
    for rank in range(world):
        state = f"rng.rank_{rank}_of_{world}.cpu"
        claims[rank] |= {name: _scalar("balance", name) for name in ("balance.bias", "balance.previous_load")}
        claims[rank][state] = _scalar("rng", state)
    return [first.get(rank, Told(claims=claims[rank])) for rank in range(world)]


def _scalar(table: str, name: str) -> Outline:
    return Outline(Layout(torch.Size([]), (), ()), TensorProperties(), (table, name.removeprefix(f"{table}.")))
