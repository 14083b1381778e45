"""One rank of a large world, alone on this machine: what its start, step and checkpoint planning cost in Python.

    python -m moe_dtensor.bench.fake_world --config F --mesh 128x4x8 [--rank R] [--only-plan] [--values] [flags]

The process group is torch's fake one: collectives return at once and bring nothing, so values mean nothing, and what
is left is the work of the host: process groups, modules, DTensors, hooks, planning. Build and planning have the
config's widths, on meta unless ``--values``; the step is real, of the same mesh, blocks and experts, with narrow widths
(:func:`narrow`), not compiled. Rank 0 plans a checkpoint for all: what the others tell it is worked out here too,
by being the first rank of one pipeline rank after the other.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.distributed_c10d import _world
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_dtensor.checkpoint.folder import INDEX, Manifest
from moe_dtensor.checkpoint.planner import Layout, Outline, PlanKeeper, Told
from moe_dtensor.checkpoint.storage import Writer
from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import is_latent, resolve, shard_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.estimate.traffic import traffic
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import read_batch, train_step

MOST_PARTS = 3_000_000
"""Of a checkpoint whose index is written here; more take more memory than 4 GB."""


def measure(config: Config, rank: int, step: bool = True, values: bool = False) -> dict[str, Any]:
    """Build, plan a checkpoint and take a step as ``rank`` of the config's mesh.

    Args:
        config: not resolved.
        rank: which; 0 also plans for all ranks.
        step: False leaves the step out.
        values: draw initial values of the rank's shards in the build of full width.

    Returns:
        Seconds of the processor by stage, resident memory in MiB, process groups, and the step's collectives by axis
        and kind.
    """
    mesh, start = config.mesh, time.perf_counter()
    found = {"mesh": f"{mesh.dp}x{mesh.pp}x{mesh.tp}", "rank": rank, **_apart(_plan, config, rank, values)}
    if step:
        stepped = _apart(_step, config, rank)
        found |= stepped | {"seconds": found["seconds"] | stepped["seconds"]}
    found["seconds by the clock"] = round(time.perf_counter() - start, 1)
    return found | {"resident MiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}


def _apart(work: Callable[..., dict[str, Any]], *words: Any) -> dict[str, Any]:
    """``work(*words)`` in a process of its own: torch keeps names of an ended world's groups in its caches."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *words).result()


def narrow(config: Config) -> Config:
    """The config with widths that take next to nothing, and as many heads, blocks and experts as before."""
    mesh, dim = config.mesh, max(64, shard_ranks(config))
    heads = {"model.head_dim": 8}
    if is_latent(config):
        query = dim if config.model.q_rank else 0
        heads = {"model.q_rank": query, "model.kv_rank": dim}
        heads |= {f"model.{name}": 8 for name in ("nope_dim", "rope_dim", "v_dim")}
    changes = {
        **heads,
        "model.dim": dim,
        "model.hidden_dim": dim,
        "model.vocab_size": 512,
        "moe.hidden_dim": 8 * mesh.tp,
        "training.seq_len": 2 * mesh.tp,
        "training.microbatch_size": 1,
        "training.global_batch_size": mesh.dp * (2 * mesh.pp if mesh.pp > 1 else 1),
        "activation_checkpoint.mode": "none",
        "compile.enable": False,
    }
    return override(config, changes)


def _plan(config: Config, rank: int, values: bool) -> dict[str, Any]:
    """Build and plan a save."""
    # What the first ranks of the other stages tell rank 0.
    others = {} if rank else told_by_stage(config)
    with member(config, rank):
        return _planned(ready(config), rank, others, values)


def _planned(config: Config, rank: int, others: dict[int, Told], values: bool) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    timed = partial(_timed, seconds)
    with timed("build"):
        trainer = build(config, torch.device("cpu"), values=values)
    with timed("state"):
        state = saved_state(trainer)
    keeper = PlanKeeper()
    with timed("local plan"):
        planner = keeper.planner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
    sent = vars(traffic(config))
    found = {
        "seconds": seconds,
        "parameters of the rank": sum(local_part(x).numel() for part in trainer.parts for x in part.parameters()),
        "process groups": len(_world.pg_map),
        "GiB sent in a step": {name: round(value / 2**30, 2) for name, value in sent.items() if value},
    }
    if rank > 0:
        return found
    told = told_by_all(config, {0: plan.planner_data, **others})
    with timed("plan of all ranks"):
        scattered, metadata = planner.create_global_plan([SavePlan([], planner_data=x) for x in told])
        planner.finish_plan(scattered[0])
    with timed("the same at the next save"):
        planner = keeper.planner()
        planner.set_up_planner(saved_state(trainer), is_coordinator=True)
        planner.create_global_plan([planner.create_local_plan(), *([SavePlan([], usable=False)] * (len(told) - 1))])
    entries = [x for x in metadata.state_dict_metadata.values() if isinstance(x, TensorStorageMetadata)]
    count = sum(len(entry.chunks) for entry in entries)
    found |= {"tensors": len(entries), "parts": count}
    if count <= MOST_PARTS:
        with timed("index"):
            found["MiB of the index"] = _index_size(metadata)
    return found


def _index_size(metadata: Metadata) -> float:
    """MiB of the index that rank 0 writes, once all ranks have told where their parts are."""
    results = [
        WriteResult(MetadataIndex(name, part.offsets), 0, _StorageInfo(f"__{number}_0.distcp", 1 << 30, 1 << 20))
        for name, entry in metadata.state_dict_metadata.items()
        for number, part in enumerate(entry.chunks)  # type: ignore[union-attr]
    ]
    with tempfile.TemporaryDirectory() as folder:
        Writer(Path(folder), Path(folder), Manifest("", "", 0), lambda: None).write_index(metadata, [results])
        return round((Path(folder) / INDEX).stat().st_size / 2**20, 1)


def _step(config: Config, rank: int) -> dict[str, Any]:
    """Build with narrow widths and values, and take two steps."""
    with member(config, rank):
        return _stepped(ready(narrow(config)))


def _stepped(config: Config) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    with _timed(seconds, "narrow build"):
        trainer = build(config, torch.device("cpu"))
    loader = Loader(config, build_corpus(config))
    with _votes_heard():
        with _timed(seconds, "first step"):
            train_step(trainer, read_batch(trainer, loader))
        with BytesSent(trainer.mesh) as sent, _timed(seconds, "step"):
            train_step(trainer, read_batch(trainer, loader))
    calls = {f"{axis} {kind}": count for (axis, kind), count in sorted(sent.calls.items())}
    return {"seconds": seconds, "collectives of a step": calls}


@contextmanager
def _votes_heard() -> Iterator[None]:
    """Stages of a pipeline ask each other, before the first step, whether all were given their shapes, as they were;
    the fake group would answer no."""
    yes = torch.ones(1, dtype=torch.int32)
    with ExitStack() as patches:
        for name in ("_warmup_forward_vote", "_warmup_backward_result"):
            patches.enter_context(mock.patch.object(PipelineStage, name, create=True, return_value=yes))
        yield


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Of the processor, this process's own: what the clock says on a machine that does nothing else."""
    start = time.process_time()
    yield
    seconds[stage] = round(time.process_time() - start, 2)


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
    """Resolved, with random data, for a CPU; a vocabulary that the config names stays."""
    config = override(config, {"data.corpus": "random", "model.attention_backend": "auto", "moe.backend": "auto"})
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


def main(argv: list[str]) -> int:
    """Print the measurement as JSON."""
    parser = Parser("fake_world", "one rank of a large world")
    parser.add_argument("--mesh", required=True, metavar="DPxPPxTP")
    parser.add_argument("--rank", type=int, default=0, help="negative: counted from the last")
    parser.add_argument("--only-plan", action="store_true", help="take no step")
    parser.add_argument("--values", action="store_true", help="draw the rank's initial values")
    options, config = parser.load(argv)
    dp, pp, tp = map(int, options.mesh.split("x"))
    config = replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp))
    rank = options.rank % (dp * pp * tp)
    print(json.dumps(measure(config, rank, not options.only_plan, options.values), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
