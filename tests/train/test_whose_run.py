"""What --run.fresh deletes, and whose checkpoints a run may touch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_dtensor.checkpoint.folder import Manifest
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.train.run_folder import open_run_folder

from .run_folders import begun, config_of, opened, save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_fresh_deletes_what_a_run_wrote_and_nothing_else(folder: Path) -> None:
    first = begun(config_of(folder))
    save_checkpoint(folder, 3)
    (folder / "checkpoints" / ".step-00000004.partial").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "tensorboard").mkdir()
    (folder / "notes.md").write_text("mine")
    fresh = config_of(folder, run={"fresh": True}, model={"dim": 512})
    run = open_run_folder(fresh, "other")
    assert run.state == "new"
    assert (folder / "metrics.jsonl").exists()  # a start that fails before its first step deletes nothing
    run.begin(0)
    run.close()
    assert run.run_id != first.run_id
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "notes.md", "run.json"]
    # Started from the file written here, the run must not delete itself.
    assert load(folder / "config.toml") == replace(fresh, run=replace(fresh.run, fresh=False))


def test_fresh_deletes_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each automatic restart of --run.fresh true deleted the run's own checkpoints."""
    fresh = config_of(folder, run={"fresh": True})
    monkeypatch.setenv("MOE_DTENSOR_START", "one")
    first = begun(fresh)
    assert opened(fresh).run_id == first.run_id
    monkeypatch.setenv("MOE_DTENSOR_START", "two")
    assert opened(fresh).run_id != first.run_id
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as restarted:
            restarted.setenv(variable, "1")
            assert opened(fresh).run_id == first.run_id


def signed(folder: Path, step: int, run_id: str) -> None:
    (folder / f"step-{step:08d}").mkdir(parents=True)
    Manifest(run_id, "text", step).write(folder / f"step-{step:08d}")


def test_fresh_deletes_no_other_runs_checkpoints(folder: Path, tmp_path: Path) -> None:
    begun(config_of(folder))
    signed(tmp_path / "shared", 3, "other")
    with pytest.raises(ConfigError, match=r"holds checkpoints of some other run \(other\)"):
        opened(config_of(folder, run={"fresh": True}, checkpoint={"folder": str(tmp_path / "shared")}))
    assert (tmp_path / "shared" / "step-00000003").exists()


def test_fresh_over_a_linked_checkpoint_folder(folder: Path, tmp_path: Path) -> None:
    """It deleted everything, then failed on the link, each time."""
    first = begun(config_of(folder))
    signed(tmp_path / "large_disk", 3, first.run_id)
    (folder / "checkpoints").symlink_to(tmp_path / "large_disk")
    begun(config_of(folder, run={"fresh": True}))
    assert (folder / "checkpoints").is_symlink()
    assert not list((tmp_path / "large_disk").iterdir())


@pytest.mark.parametrize("fresh", [False, True])
def test_foreign_folder_is_left_alone(folder: Path, fresh: bool) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no run of this program \(no run.json\)"):
        opened(config_of(folder, run={"fresh": fresh}))
    assert (folder / "config.toml").read_text() == "mine"


@pytest.mark.parametrize("begins", [False, True])
def test_checkpoints_of_another_run(folder: Path, tmp_path: Path, begins: bool) -> None:
    """An unfinished run used to adopt them."""
    begun(config_of(folder))
    save_checkpoint(folder, 3)
    shared = config_of(tmp_path / "second", checkpoint={"folder": str(folder / "checkpoints")})
    if begins:
        begun(config_of(tmp_path / "second"))
    with pytest.raises(ConfigError, match="holds checkpoints of some other run"):
        opened(shared)
