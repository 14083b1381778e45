"""The same TOML gives the same losses on every mesh: real corpus, real collectives, real optimizer steps."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.step import read_batch, train_step

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
MESHES = ((2, 2, 2), (1, 3, 8), (1, 2, 4), (4, 1, 2))


def run(mesh: tuple[int, int, int], dtype: str, steps: int) -> list[float]:
    """Losses of the first steps of debug.toml."""
    dp, pp, tp = mesh
    overrides = {"mesh.dp": str(dp), "mesh.pp": str(pp), "mesh.tp": str(tp)}
    overrides |= {f"training.{key}": dtype for key in ("dtype", "param_dtype", "reduce_dtype")}
    ranks = run_on_ranks(_losses, dp * pp * tp, overrides, steps, timeout=1800)
    assert all(losses == ranks[0] for losses in ranks), "ranks report different losses"
    return ranks[0]


def _losses(overrides: dict[str, str], steps: int) -> list[float]:
    config = resolve(load(DEBUG, overrides), torch.distributed.get_world_size())
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    trainer = build(config, torch.device("cpu"))
    loader = Loader(config, corpus)
    return [train_step(trainer, read_batch(trainer, loader)).loss.item() for _ in range(steps)]


@cache
def one_rank(dtype: str, steps: int) -> list[float]:
    return run((1, 1, 1), dtype, steps)


def test_a_small_mesh_agrees_in_float64() -> None:
    assert run((2, 2, 2), "float64", 3) == pytest.approx(one_rank("float64", 3), rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_thirty_steps_agree_in_float64(mesh: tuple[int, int, int]) -> None:
    losses, expected = run(mesh, "float64", 30), one_rank("float64", 30)
    worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"{mesh}: worst relative difference of 30 losses {worst:.1e}; first {losses[0]:.6f}, last {losses[-1]:.6f}")
    assert worst < 1e-9


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_five_steps_agree_in_float32(mesh: tuple[int, int, int]) -> None:
    losses, expected = run(mesh, "float32", 5), one_rank("float32", 5)
    worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"{mesh}: worst relative difference of 5 losses {worst:.1e}")
    assert worst < 1e-5
