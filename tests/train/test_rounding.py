"""Weights in bfloat16: with a remainder they are float32 weights, by chance they are right on average, and both are
alike on all replicas, meshes and after a resume."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import optimizer
from moe_dtensor.train.build import build
from moe_dtensor.train.optimizer import Optimizers
from moe_dtensor.train.replicas import replicas
from moe_dtensor.train.rounding import Chance, join, round_by_chance, split
from moe_dtensor.train.step import read_batch, train_step


def any_floats(count: int) -> Tensor:
    """Of every size, both signs, zeros, subnormals and halfway cases among them; no NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    bits[::3] = bits[::3] & ~0xFFFF | 0x8000
    floats = torch.cat([bits, torch.tensor([0, -(2**31), 1, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)])
    floats = floats.view(torch.float32)
    return floats[~floats.isnan()].contiguous()


def test_a_split_weight_is_the_float32_weight_and_its_half_the_nearest() -> None:
    wide = any_floats(100_000)
    narrow, remainder = split(wide)
    assert (narrow.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(narrow, remainder).view(torch.int32), wide.view(torch.int32))
    finite = narrow.isfinite() & wide.isfinite()
    far, cast = ((x.double() - wide.double()).abs()[finite] for x in (narrow, wide.to(torch.bfloat16)))
    assert torch.equal(far, cast)
    assert narrow[wide.isinf()].isinf().all()


def test_rounding_by_chance_is_right_on_average_and_reaches_the_neighbours_only() -> None:
    shape, count = (8, 8192), torch.tensor(3.0)
    chance = Chance(torch.empty(shape), "w", 0).draw(0, math.prod(shape), count)
    for share in (0.0, 0.03, 0.5, 0.9):
        for low, high in ((1.0, 1.0 + 2**-7), (-3.0, -3.0 - 2**-6)):
            wide = torch.full((math.prod(shape),), low + share * (high - low))
            up = round_by_chance(wide, chance) == high
            assert torch.equal(up, round_by_chance(wide, chance) != low)
            deviation = math.sqrt(share * (1 - share) / len(up))
            assert abs(float(up.double().mean()) - share) <= 4 * deviation
    held = any_floats(1000).to(torch.bfloat16)
    assert torch.equal(round_by_chance(held.float(), chance[: len(held)]), held)


def test_chance_looks_like_chance() -> None:
    """All numbers alike often; what elements, updates, names and seeds draw has nothing to do with each other."""
    size = 1 << 18
    weight = torch.empty(512, 512)
    draws = [
        Chance(weight, name, seed).draw(0, size, torch.tensor(updates))
        for name, seed, updates in (("a", 0, 0.0), ("a", 0, 1.0), ("b", 0, 0.0), ("a", 1, 0.0))
    ]
    draws += [draws[0].roll(by) for by in (1, 512)]
    for drawn in draws:
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < 1 << 16
        counts = torch.bincount(drawn >> 8, minlength=256).double()
        assert float(((counts - size / 256) ** 2 / (size / 256)).sum()) < 255 + 4 * math.sqrt(2 * 255)
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
            assert abs(float(correlation)) < 4 / math.sqrt(size)


def test_elements_beyond_32_bits_draw_anew() -> None:
    """As many as a large model's stacked experts have."""
    chance = Chance(torch.empty(1 << 17, 1 << 16, device="meta"), "w", 0)
    here, far = (chance.draw(start, start + 1000, torch.tensor(0.0)) for start in (5, (1 << 32) + 5))
    assert (here == far).float().mean() < 0.01


def _drawn() -> dict[str, Tensor]:
    """What this rank draws, put in its place in the whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {}
    for name, places in (
        ("both", (Shard(1), Shard(0))),
        ("tp", (Replicate(), Shard(0))),
        ("uneven", (Shard(0), Shard(1))),
    ):
        shape = (7, 5) if name == "uneven" else (6, 4)
        parameter = distribute_tensor(torch.zeros(shape), mesh, places)
        local = parameter.to_local()
        chance = Chance(parameter, "w", 0)
        drawn = chance.draw(0, local.numel(), torch.tensor(2.0)).view(local.shape)
        held, runs = torch.arange(local.numel()), chance.elements
        assert runs is not None
        numbers = runs.base + held // runs.run * runs.stride + held % runs.run
        assert torch.equal(numbers, chance._elements(0, local.numel(), torch.device("cpu")))
        found[name] = DTensor.from_local(
            drawn, mesh, places, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
        )
    return {name: value.full_tensor() for name, value in found.items()}


def test_ranks_draw_what_one_rank_would() -> None:
    for rank in run_on_ranks(_drawn, 4):
        for name, got in rank.items():
            whole = Chance(torch.zeros(got.shape), "w", 0)
            starts = range(0, got.numel(), 10)
            pieces = [whole.draw(start, min(start + 10, got.numel()), torch.tensor(2.0)) for start in starts]
            want = torch.cat(pieces).view(got.shape)
            assert torch.equal(got, want), name


BASE = override(Config(), {"optimizer.weight_decay": 0.1, "training.param_dtype": "bfloat16"})


class Part(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        self.wq = nn.Linear(50, 6, bias=False, dtype=dtype)
        self.wq.weight.data.copy_(values)


def updated(dtype: str, rounding: str, steps: int, lr: float = 1e-3, constant: bool = False) -> tuple[Part, Optimizers]:
    changes = {"training.dtype": dtype, "optimizer.rounding": rounding, "optimizer.state_dtype": "float32"}
    part = Part(getattr(torch, dtype))
    optimizers = Optimizers([part], override(BASE, {**changes, "optimizer.lr": lr}))
    for step in range(steps):
        seed = 0 if constant else step
        grad = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        part.wq.weight.grad = grad.to(part.wq.weight.dtype)
        optimizers.step()
    return part, optimizers


def test_with_a_remainder_weights_are_those_of_float32_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, state = updated("float32", "nearest", 30)
    part, optimizers = updated("bfloat16", "remainder", 30)
    kept = optimizers.state_dict()
    assert kept["state.wq.weight.remainder"].dtype == torch.int16
    assert torch.equal(join(part.wq.weight.data, kept["state.wq.weight.remainder"]), exact.wq.weight)
    for key, value in state.state_dict().items():
        assert torch.equal(value, kept[key]), key
    lost, _ = updated("bfloat16", "nearest", 30)
    assert (lost.wq.weight != part.wq.weight).float().mean() > 0.1
    # In pieces of 64, which torch's kernel takes by the same instructions.
    monkeypatch.setattr(optimizer, "PIECE", 64)
    pieces, _ = updated("bfloat16", "remainder", 30)
    assert torch.equal(pieces.wq.weight, part.wq.weight)


def test_small_updates_are_lost_by_rounding_to_nearest_and_arrive_on_average_by_chance() -> None:
    lr, steps = 1e-4, 100
    exact, nearest, chance = (
        updated(dtype, rounding, steps, lr, constant=True)[0].wq.weight.detach().double()
        for dtype, rounding in (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "stochastic"))
    )
    start = Part(torch.float32).wq.weight.detach().double()
    large = start.abs() > 0.5
    assert torch.equal(nearest[large], start[large])
    assert (exact - start).abs()[large].min() > lr * steps / 2
    # A step of bfloat16 is |w| / 128 at most, and each update takes one with chance lr / step, whatever the last did.
    error, variance = (chance - exact)[large], steps * lr * start[large].abs() / 128
    assert abs(float(error.mean())) < 4 * float((variance.sum()) ** 0.5) / len(error)
    assert 0.3 < float((error**2 / variance).mean()) < 1.3


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_an_update_that_is_skipped_changes_no_weight(rounding: str) -> None:
    """As on a GPU, where the optimizer is told that a gradient is not finite."""
    part, optimizers = updated("bfloat16", rounding, 3)
    before = {key: value.clone() for key, value in optimizers.state_dict().items()}
    weight = part.wq.weight.detach().clone()
    assert part.wq.weight.grad is not None
    for each in optimizers:
        each.found_inf = torch.ones(())  # type: ignore[attr-defined]
    part.wq.weight.grad.fill_(torch.inf)
    optimizers.step()
    assert torch.equal(part.wq.weight, weight)
    assert all(torch.equal(value, before[key]) for key, value in optimizers.state_dict().items())


CONFIG = override(
    Config(),
    {
        "model.num_layers": 2,
        "model.dim": 32,
        "model.num_heads": 4,
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "data.corpus": "random",
        "training.seq_len": 8,
        "training.global_batch_size": 8,
        "training.microbatch_size": 2,
        "training.dtype": "bfloat16",
    },
)


@dataclass(frozen=True)
class Place:
    rounding: str
    mesh: tuple[int, int, int]
    dp_replicate: int = 1
    steps: int = 0
    """To take before saving; else the checkpoint is read."""
    saved_with: str = ""


def _work(place: Place, folder: Path) -> dict[str, str]:
    """Digests of the state by name: whole tensors where it is saved or read, and after 2 more steps."""
    dp, pp, tp = place.mesh
    changes = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "mesh.dp_replicate": place.dp_replicate}
    config = resolve(override(CONFIG, {**changes, "optimizer.rounding": place.rounding}), dp * pp * tp)
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, corpus)
    manager = CheckpointManager(
        folder, config, list(trainer.parts), trainer.optimizers, trainer.schedule, loader, trainer.balance
    )
    for _ in range(place.steps):
        train_step(trainer, read_batch(trainer, loader))
    if place.steps:
        manager.save(place.steps)
    else:
        manager.load_latest()
    found = {f"saved {name}": value for name, value in _digests(manager).items()}
    for _ in range(2):
        train_step(trainer, read_batch(trainer, loader))
    found |= {f"after {name}": value for name, value in _digests(manager).items()}
    return found | {f"replica {name}": _digest(value) for name, value in replicas(trainer)}


def _digests(manager: CheckpointManager) -> dict[str, str]:
    state = manager._tensors()
    tensors = {**state["model"], **state["optimizer"]}
    # No backend gathers int16.
    wide = {name: x.to(torch.int32) if x.dtype == torch.int16 else x for name, x in tensors.items()}
    return {name: _digest(x.full_tensor() if isinstance(x, DTensor) else x) for name, x in wide.items()}


def _digest(x: Tensor) -> str:
    x = x.detach().contiguous()
    x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_checkpoints_resume_bit_for_bit_and_move_between_meshes(rounding: str, tmp_path: Path) -> None:
    here = Place(rounding, (2, 1, 2), dp_replicate=2, steps=3)
    whole = run_on_ranks(_work, 4, here, tmp_path)
    # dp ranks are replicas of each other here, tp ranks of norms and routers.
    assert whole[0] == whole[2]
    assert all({k: v for k, v in whole[0].items() if k in rank} == rank for rank in whole)
    assert any(key.endswith(".remainder") for key in whole[0]) == (rounding == "remainder")
    again = run_on_ranks(_work, 4, Place(rounding, (2, 1, 2), dp_replicate=2), tmp_path)
    assert again == whole
    moved: dict[str, str] = {}
    for rank in run_on_ranks(_work, 2, Place(rounding, (1, 2, 1)), tmp_path):
        moved |= {key: value for key, value in rank.items() if key.startswith("saved")}
    assert moved == {key: value for key, value in whole[0].items() if key.startswith("saved")}


def test_a_checkpoint_without_remainders_is_read_as_it_is(tmp_path: Path) -> None:
    saved = run_on_ranks(_work, 1, Place("stochastic", (1, 1, 1), steps=2), tmp_path)[0]
    read = run_on_ranks(_work, 1, Place("remainder", (1, 1, 1)), tmp_path)[0]
    both = {key for key in saved if key.startswith("saved")}
    assert all(read[key] == saved[key] for key in both)
    assert read.keys() - saved.keys()
