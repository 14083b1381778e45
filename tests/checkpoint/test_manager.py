"""Checkpoints: whole or absent, the same bits on any mesh, readable by torch's own tools."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moe_dtensor.checkpoint.folder import checksum, read_manifest, step_folder, whole_steps
from moe_dtensor.checkpoint.manager import Identity
from moe_dtensor.config.errors import ConfigError, RunError
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
    trained(tmp_path / "two", 4, keep_last=2)[0].wait()
    assert whole_steps(tmp_path / "two") == [3, 4]
    trained(tmp_path / "all", 4, keep_last=0)[0].wait()
    assert whole_steps(tmp_path / "all") == [1, 2, 3, 4]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_killed_save_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    manager, run = trained(tmp_path, 2)
    want = full_state(manager)
    train_step(*run, seed=3)

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    target = {
        "while writing": "torch.distributed.checkpoint.filesystem._write_item",
        "before the rename": "moe_dtensor.checkpoint.storage.os.replace",
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(target, kill)
        with pytest.raises(CheckpointException, match="Killed"):
            manager.save(3)
    assert leftovers(tmp_path)

    again, *_ = run_of(tmp_path, [Stage()], config_of())
    assert again.load_latest() == 2
    assert_same(full_state(again), want)
    again.save(4)
    again.wait()
    assert not leftovers(tmp_path)
    assert again.latest() == 4


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".step")]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed deletion used to end the run, and each restart of it, although the new checkpoint was whole."""
    parts: list[nn.Module] = [Stage()]
    told: list[str] = []
    manager, _ = run_of(tmp_path, parts, config_of(keep_last=2), warn=told.append)

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith(".deleted"):
            raise PermissionError(13, "Permission denied", str(source))
        os.rename(source, target)

    monkeypatch.setattr("moe_dtensor.checkpoint.folder.os.replace", fail)
    for step in range(1, 5):
        manager.save(step)
    manager.wait()
    assert whole_steps(tmp_path) == [1, 2, 3, 4]
    assert len(told) == 2  # steps 1 and 2, each once
    assert "step-00000001: Permission denied" in told[0]


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


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    """A failed write used to end the run; in the background, it was raised again and again."""
    told: list[str] = []
    manager, _ = run_of(tmp_path, [Stage()], config_of(async_save=async_save), warn=told.append)
    manager.save(1)
    manager.wait()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "__0_0.distcp")

    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.filesystem._write_item", fail)
        manager.save(2)
        manager.wait()
    assert manager.saved_step == 1
    assert len(told) == 1
    assert "the checkpoint of step 2 was not written: rank 0: No space left on device" in told[0]
    assert "the newest is that of step 1. The next save tries again" in told[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    manager.save(3)
    manager.wait()
    assert manager.saved_step == 3


def break_file(how: str, folder: Path) -> None:
    """Damage a checkpoint in one of the ways of disks and hands."""
    shard, index = folder / "__0_0.distcp", folder / ".metadata"
    match how:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "missing shard":
            shard.unlink()
        case "empty index":
            index.write_bytes(b"")
        case "missing index":
            index.unlink()
        case "flipped":
            content = bytearray(shard.read_bytes())
            middle = len(content) // 2
            content[middle : middle + 500] = bytes(255 - b for b in content[middle : middle + 500])
            shard.write_bytes(content)
        case "swapped":
            other = folder.parent / "step-00000001"
            os.rename(folder, folder.parent / "aside")
            os.rename(other, folder)
            os.rename(folder.parent / "aside", other)
        case "manifest cut":
            (folder / "manifest.json").write_text('{"run_id": "run", "da')
        case "code in the index":
            index.write_bytes(pickle.dumps(Evil()))
            manifest = read_manifest(folder)
            assert manifest is not None
            files = {**manifest.files, ".metadata": (index.stat().st_size, checksum(index))}
            replace(manifest, files=files).write(folder)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/moe_dtensor_was_here",)


BROKEN = {
    "truncated": "__0_0.distcp has ",
    "missing shard": "__0_0.distcp is missing",
    "empty index": ".metadata has 0 bytes",
    "missing index": ".metadata is missing",
    "flipped": "the contents of __0_0.distcp are not what was written",
    "swapped": "it was saved after step 1",
    "manifest cut": "manifest.json cannot be read",
    "code in the index": "which no index of a checkpoint has",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_offered(tmp_path: Path, how: str) -> None:
    """Raw EOFErrors, or 4,000 flipped bytes loaded without a word; an index could run any code."""
    trained(tmp_path, 2)[0].wait()
    break_file(how, tmp_path / "step-00000002")
    manager, _ = run_of(tmp_path, [Stage()], config_of())
    before = full_state(manager)
    with pytest.raises(ConfigError, match="step-00000002' is damaged: ") as error:
        manager.load_latest()
    assert BROKEN[how] in error.value.problem
    if how != "swapped":
        assert "The one before it, of step 1, is whole" in error.value.remedy
    assert_same(full_state(manager), before)
    assert not Path("/tmp/moe_dtensor_was_here").exists()


def test_checksums_are_compared_by_choice(tmp_path: Path) -> None:
    trained(tmp_path, 2)[0].wait()
    manifest = read_manifest(tmp_path / "step-00000002")
    assert manifest is not None
    replace(manifest, files={**manifest.files, "__0_0.distcp": (manifest.files["__0_0.distcp"][0], 1)}).write(
        tmp_path / "step-00000002"
    )
    with pytest.raises(ConfigError, match="not what was written"):
        run_of(tmp_path, [Stage()], config_of())[0].load(2)
    manager, _ = run_of(tmp_path, [Stage()], config_of(verify=False))
    assert manager.load_latest() == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    mine, other = Identity("mine", "text"), Identity("other", "text")
    manager, _ = run_of(tmp_path, [Stage()], config_of(), identity=other)
    manager.save(1)
    manager.wait()
    again, _ = run_of(tmp_path, [Stage()], config_of(), identity=mine)
    with pytest.raises(ConfigError, match=r"saved by another run \(other, this one is mine\)"):
        again.load_latest()


def test_only_own_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    """Two starts at once used to remove each other's half-written checkpoints."""
    foreign, own = tmp_path / ".step-00000001.other.start.partial", tmp_path / ".step-00000001.mine.before.partial"
    foreign.mkdir()
    own.mkdir()
    manager, _ = run_of(tmp_path, [Stage()], config_of(), identity=Identity("mine", "text"))
    manager.save(1)
    manager.wait()
    assert leftovers(tmp_path) == [foreign.name]


def test_a_process_that_lost_the_run_writes_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise RunError("lost the run")

    manager, _ = run_of(tmp_path, [Stage()], config_of(), identity=Identity("mine", "", check_owner=lost))
    with pytest.raises(RunError, match="lost the run"):
        manager.save(1)
    assert whole_steps(tmp_path) == []


def test_torch_reads_it(tmp_path: Path) -> None:
    manager, _ = trained(tmp_path, 1)
    manager.wait()
    dcp_to_torch_save(step_folder(tmp_path, 1), tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=True)
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
