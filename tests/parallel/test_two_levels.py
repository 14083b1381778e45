"""Two levels of dp: ``mesh.dp_replicate``, and groups of dp ranks that share experts (``mesh.expert_ranks``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.check import check
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.estimate.shards import all_shards
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import read_batch, train_step
from moe_dtensor.verify.miniature import Case, Layout
from moe_dtensor.verify.run import prove

Keys = dict[str, Any]
SMALL: Keys = {
    "model.num_layers": 2,
    "model.dim": 16,
    "model.num_heads": 4,
    "model.hidden_dim": 16,
    "model.vocab_size": 257,
    "moe.num_experts": 8,
    "moe.hidden_dim": 8,
    "moe.router": "topk",
    "data.corpus": "random",
    "training.seq_len": 8,
    "training.microbatch_size": 1,
    "training.global_batch_size": 8,
    "lr_scheduler.warmup_steps": 2,
    "lr_scheduler.decay": "constant",
    "optimizer.lr": 1e-2,
    **{f"training.{name}": "float64" for name in ("dtype", "param_dtype", "reduce_dtype")},
}


def groups(experts: str, ranks: int, **more: Any) -> Keys:
    return {"mesh.experts": experts, "mesh.expert_ranks": ranks} | {k.replace("__", "."): v for k, v in more.items()}


SHARDED: Keys = {"mesh.expert_weights": "sharded"}
PROVEN: list[tuple[Layout, Keys]] = [
    (Layout(2, 1, 1), groups("dp", 1) | SHARDED),
    (Layout(4, 1, 1), groups("dp", 2) | {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (Layout(4, 1, 1), groups("dp", 2) | SHARDED | {"mesh.dispatch": "all_to_all"}),
]
MORE: list[tuple[Layout, Keys]] = [
    (Layout(4, 1, 1), groups("dp", 2)),
    (Layout(4, 1, 1), groups("dp", 2) | SHARDED | {"mesh.dispatch": "all_to_all", "fsdp.accumulate": "sharded"}),
    (Layout(4, 1, 1), {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (Layout(4, 1, 1), {"mesh.dp_replicate": 2} | groups("dp", 1) | SHARDED),
    (Layout(4, 1, 1), {"mesh.dp_replicate": 4, "mesh.experts": "dp_tp"}),
    (Layout(4, 1, 1), groups("dp", 1)),
    (Layout(4, 1, 1), groups("dp", 4) | {"mesh.dp_replicate": 2}),
    (Layout(4, 1, 2), groups("dp", 2) | {"mesh.sequence_parallel": False}),
    (Layout(4, 1, 2), groups("dp", 2) | SHARDED | {"moe.expert_bias": True, "fsdp.accumulate": "sharded"}),
    (Layout(4, 1, 2), groups("dp_tp", 2)),
    (Layout(4, 1, 2), groups("dp_tp", 2) | SHARDED | {"mesh.dispatch": "all_to_all"}),
    (Layout(4, 1, 2), groups("dp_tp", 1) | {"mesh.dp_replicate": 2} | SHARDED),
    (Layout(4, 2, 1, "1F1B"), groups("dp", 2) | {"fsdp.accumulate": "sharded", "mesh.dp_replicate": 2}),
    (Layout(4, 2, 1, "Interleaved1F1B"), groups("dp", 2) | SHARDED),
    (Layout(4, 2, 1, "ZBVZeroBubble"), groups("dp", 2) | SHARDED | {"fsdp.accumulate": "sharded"}),
    (Layout(4, 2, 1, "ZBVZeroBubble"), groups("dp", 1) | {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (Layout(8, 1, 1), groups("dp", 2)),
    (Layout(8, 1, 1), groups("dp", 2) | SHARDED | {"mesh.dp_replicate": 2}),
    (Layout(8, 1, 1), {"mesh.dp_replicate": 2, "mesh.experts": "dp_tp", "moe.num_shared_experts": 1}),
    (Layout(4, 2, 2, "1F1B"), groups("dp_tp", 2) | SHARDED | {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
]


def _prove(layouts: list[tuple[Layout, Keys]]) -> None:
    cases = [Case(layout, override(Config(), SMALL | keys | _pipeline(layout))) for layout, keys in layouts]
    for case, verdict in zip(cases, prove(cases), strict=True):
        assert verdict.ok, f"{case.layout}: {verdict.worst} {verdict.failed()[:5]} {verdict.failure}"
        assert verdict.largest("gradient") < 1e-9


def _pipeline(layout: Layout) -> Keys:
    if layout.pp == 1:
        return {}
    return {"model.num_layers": 4, "training.global_batch_size": 16, "pipeline.schedule": layout.schedule}


def test_gradients_are_the_oracles() -> None:
    _prove(PROVEN)


@pytest.mark.full
@pytest.mark.parametrize("world", [4, 8, 16])
def test_gradients_on_more_meshes(world: int) -> None:
    _prove([(layout, keys) for layout, keys in MORE if layout.world_size == world])


def start(keys: Keys) -> Trainer:
    ranks = torch.distributed.get_world_size()
    config = override(Config(), SMALL | keys)
    check(config, ranks)
    return build(resolve(config, ranks), torch.device("cpu"))


def _held(keys: Keys) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(param.to_local().shape)
        for name, param in start(keys).parts[0].named_parameters()
        if isinstance(param, DTensor)
    }


HELD: list[Keys] = [
    groups("dp", 2),
    groups("dp", 2) | SHARDED,
    {"mesh.dp_replicate": 2} | groups("dp", 1) | SHARDED,
    {"mesh.dp_replicate": 2, "mesh.experts": "dp"},
]


def _all_held() -> list[dict[str, tuple[int, ...]]]:
    return [_held(keys) for keys in HELD]


def test_a_rank_holds_what_is_planned() -> None:
    ranks = run_on_ranks(_all_held, 4, timeout=300)
    for i, keys in enumerate(HELD):
        planned = {s.name: s.local for s in all_shards(resolve(override(Config(), SMALL | keys), 4))}
        for rank in ranks:
            assert rank[i] == planned, keys


def manager(trainer: Trainer, folder: Path) -> tuple[CheckpointManager, Loader]:
    loader = Loader(trainer.config, build_corpus(trainer.config))
    state = (trainer.optimizers, trainer.schedule, loader, trainer.balance)
    return CheckpointManager(folder, trainer.config, list(trainer.parts), *state), loader


def _train(keys: Keys, folder: Path, steps: int, resumed: bool) -> list[float]:
    trainer = start(keys | ({"model.init_std": 0.5} if resumed else {}))
    checkpoints, loader = manager(trainer, folder)
    if resumed:
        checkpoints.load(1)
    losses = []
    for step in range(1, steps + 1):
        losses.append(train_step(trainer, read_batch(trainer, loader)).loss.item())
        if step == 1 and not resumed:
            checkpoints.save(1)
    return losses


LAYOUTS: list[tuple[int, Keys]] = [(4, groups("dp", 2) | SHARDED)]
MORE_LAYOUTS: list[tuple[int, Keys]] = [
    (4, groups("dp", 2) | {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (4, groups("dp", 2)),
    (4, {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (8, groups("dp", 2)),
    (8, groups("dp", 2) | SHARDED | {"mesh.dp_replicate": 2, "fsdp.accumulate": "sharded"}),
    (8, {"mesh.tp": 2, "mesh.dp_replicate": 2} | groups("dp_tp", 2)),
    (8, {"mesh.tp": 2} | groups("dp_tp", 2) | SHARDED),
]


def _check_losses(tmp_path: Path, layouts: list[tuple[int, Keys]], steps: int) -> None:
    """As on one rank; and from each one's checkpoint the run goes on as it would have on the first."""
    expected = run_on_ranks(_train, 1, {}, tmp_path / "one", steps, False)[0]
    saved = tmp_path / "one"
    for i, (world, keys) in enumerate(layouts):
        own = tmp_path / str(i)
        for losses in run_on_ranks(_train, world, keys, own, steps, False, timeout=500):
            assert losses == pytest.approx(expected, rel=1e-12), keys
        for losses in run_on_ranks(_train, world, keys, saved, 2, True, timeout=500):
            assert losses == pytest.approx(expected[1:3], rel=1e-12), f"{keys} after the one before"
        saved = own
    assert run_on_ranks(_train, 1, {}, saved, 2, True)[0] == pytest.approx(expected[1:3], rel=1e-12)


def test_losses_and_checkpoints_are_those_of_one_rank(tmp_path: Path) -> None:
    _check_losses(tmp_path, LAYOUTS, 3)


@pytest.mark.full
def test_thirty_losses_and_checkpoints_on_more_meshes(tmp_path: Path) -> None:
    _check_losses(tmp_path, [*LAYOUTS, *MORE_LAYOUTS], 30)
