"""Checkpoints: whole or absent, the same bits on any mesh, readable by torch's own tools."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moe_dtensor.checkpoint.folder import step_folder, whole_steps
from moe_dtensor.testing.ranks import run_on_ranks

from .runs import Stage, assert_same, config_of, full_state, run_of, shard, train_step, trained

# One process without a group is what these want; DCP says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_resume_restores_everything(tmp_path: Path) -> None:
    manager, (_, rest) = trained(tmp_path, 3)
    want, noise = full_state(manager), torch.rand(3)
    torch.manual_seed(99)
    parts: list[nn.Module] = [Stage()]
    again, rest_again = run_of(tmp_path, parts, config_of())
    assert again.load_latest() == 3
    assert_same(full_state(again), want)
    assert rest_again.schedule.lr == rest.schedule.lr
    assert rest_again.position.state == {"batch": 3, "order": [3, 1, 2]}
    assert torch.equal(torch.rand(3), noise)


def test_nothing_to_load(tmp_path: Path) -> None:
    manager, *_ = run_of(tmp_path / "new", [Stage()], config_of())
    before = full_state(manager)
    assert manager.load_latest() is None
    assert_same(full_state(manager), before)


def test_step_counts_start_at_zero(tmp_path: Path) -> None:
    """torch makes a missing optimizer state by a step on zero gradients, which would count as one."""
    manager, *_ = run_of(tmp_path, [Stage()], config_of())
    manager.save(0)
    manager.load(0)
    assert full_state(manager)["state.layers.0.up.weight.step"] == 0


def test_keep_last(tmp_path: Path) -> None:
    trained(tmp_path / "two", 4, keep_last=2)
    assert whole_steps(tmp_path / "two") == [3, 4]
    trained(tmp_path / "all", 4, keep_last=0)
    assert whole_steps(tmp_path / "all") == [1, 2, 3, 4]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["while writing", "before the rename", "while deleting"])
def test_killed_save_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    manager, run = trained(tmp_path, 2)
    want = full_state(manager)
    train_step(*run, seed=3)

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    target = {
        "while writing": "torch.distributed.checkpoint.filesystem._write_item",
        "before the rename": "moe_dtensor.checkpoint.folder.os.replace",
        "while deleting": "moe_dtensor.checkpoint.folder.shutil.rmtree",
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(target, kill)
        with pytest.raises(CheckpointException, match="Killed"):
            manager.save(3)
    leftovers = [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".step")]
    assert leftovers

    again, *_ = run_of(tmp_path, [Stage()], config_of())
    if moment == "while deleting":  # The new checkpoint was whole by then; the one half deleted is gone.
        assert again.load_latest() == 3
        assert whole_steps(tmp_path) == [2, 3]
    else:
        assert again.load_latest() == 2
        assert_same(full_state(again), want)
    again.save(4)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".step")]
    assert again.latest() == 4


def test_same_step_again(tmp_path: Path) -> None:
    manager, run = trained(tmp_path, 1)
    train_step(*run, seed=7)
    want = full_state(manager)
    manager.save(1)
    again, *_ = run_of(tmp_path, [Stage()], config_of())
    assert again.load_latest() == 1
    assert_same(full_state(again), want)


def test_async_equals_sync(tmp_path: Path) -> None:
    """The state written is that of the call, although training goes on at once."""
    manager, run = trained(tmp_path, 2, async_save=True)
    want = full_state(manager)
    train_step(*run, seed=3)
    manager.wait()
    again, *_ = run_of(tmp_path, [Stage()], config_of())
    assert again.load_latest() == 2
    assert_same(full_state(again), want)


def test_async_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = trained(tmp_path, 1, async_save=True)
    manager.wait()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("moe_dtensor.checkpoint.folder.os.replace", fail)
    manager.save(2)
    with pytest.raises(CheckpointException, match="disk full"):
        manager.wait()


def test_torch_reads_it(tmp_path: Path) -> None:
    manager, _ = trained(tmp_path, 1)
    dcp_to_torch_save(step_folder(tmp_path, 1), tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=False)
    assert state["step"] == 1
    model = Stage()
    model.load_state_dict(state["model"])
    assert_same(dict(model.state_dict()), manager._tensors()["model"])


def test_lr_follows_the_config(tmp_path: Path) -> None:
    """A resume with another learning rate and weight decay uses them."""
    trained(tmp_path, 2)
    config = config_of()
    config = replace(config, optimizer=replace(config.optimizer, lr=0.5, weight_decay=0.3, beta2=0.9))
    manager, rest = run_of(tmp_path, [Stage()], config)
    manager.load_latest()
    groups = next(iter(rest.optimizers)).param_groups
    assert rest.schedule.lr == 0.5 * 3 / 20
    assert [group["lr"] for group in groups] == [rest.schedule.lr] * 2
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert groups[0]["betas"] == (0.9, 0.9)


MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)]


def on_mesh(folder: Path, shape: tuple[int, int, int], save: bool, async_save: bool) -> dict[str, np.ndarray]:
    """Train three steps and save, or load; return this rank's full state."""
    _, pp, tp = shape
    stage = 0 if pp == 1 else (int(os.environ["RANK"]) // tp) % pp
    # On one pipeline rank the model is in two parts, as in an interleaved schedule.
    parts: list[nn.Module] = [Stage(0, 1), Stage(1, 2)] if pp == 1 else [Stage(stage, stage + 1)]
    for part in parts:
        shard(part, *shape)
    config = config_of(async_save=async_save)
    manager, rest = run_of(folder, parts, config)
    if save:
        for step in range(1, 4):
            train_step(parts, rest, step)
        manager.save(3)
        manager.wait()
    else:
        assert manager.load_latest() == 3
        assert rest.position.state["batch"] == 3
    return {key: value.numpy() for key, value in full_state(manager).items()}


@pytest.mark.parametrize("saved_on", [(2, 1, 2), (1, 2, 2)])
def test_any_mesh_loads_the_same_bits(tmp_path: Path, saved_on: tuple[int, int, int]) -> None:
    def gathered(results: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value) for result in results for key, value in result.items()}

    folder = tmp_path / "sharded"
    want = gathered(run_on_ranks(on_mesh, 4, folder, saved_on, True, saved_on[0] == 2))
    one_process = full_state(trained(tmp_path / "plain", 3)[0])
    assert want.keys() == one_process.keys()
    for key, value in one_process.items():
        torch.testing.assert_close(want[key], value)
    for shape in MESHES:
        ranks = shape[0] * shape[1] * shape[2]
        assert_same(gathered(run_on_ranks(on_mesh, ranks, folder, shape, False, False)), want)
    plain, *_ = run_of(folder, [Stage()], config_of())
    assert plain.load_latest() == 3
    assert_same(full_state(plain), want)
