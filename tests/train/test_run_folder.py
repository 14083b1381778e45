"""A run's folder: resumes, refuses what is another run, deletes only what a run wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import lease
from moe_dtensor.train.run_folder import open_run_folder
from moe_dtensor.train.sinks import cut_back, last_step

from .run_folders import begun, config_of, opened, save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_new(folder: Path) -> None:
    config = config_of(folder)
    run = begun(config)
    assert (run.state, run.message) == ("new", "")
    assert run.checkpoints == folder / "checkpoints"
    assert load(folder / "config.toml") == config


def test_a_folder_becomes_a_run_with_its_first_step(folder: Path) -> None:
    """A start that failed on a misspelt key, mended as told, used to be refused as another run."""
    run = open_run_folder(config_of(folder, data={"text_key": "txt"}), "a")
    assert [p.name for p in folder.iterdir()] == [".lease.json"]
    run.close()
    assert not folder.exists()
    assert begun(config_of(folder), "b").state == "new"


def test_unfinished_resumes_with_another_mesh(folder: Path) -> None:
    first = begun(config_of(folder))
    save_checkpoint(folder, 40)
    config = config_of(
        folder,
        mesh={"dp": 1, "tp": 4},
        training={"steps": 50, "param_dtype": "float32"},
        optimizer={"lr": 1.0},
        moe={"backend": "reference"},
        metrics={"log_interval": 5},
    )
    run = begun(config, steps=40)
    assert (run.state, run.run_id) == ("unfinished", first.run_id)
    assert "after step 40 of 50" in run.message
    assert load(folder / "config.toml") == config


def test_a_runs_config_fits_another_mesh(folder: Path) -> None:
    """It was frozen to its mesh: dp, stages on a rank and resharding as resolved there."""
    given = config_of(folder, mesh={"pp": 2}, pipeline={"schedule": "Interleaved1F1B"})
    resolved = resolve(given, 4)
    assert (resolved.mesh.dp, resolved.pipeline.stages_per_rank, resolved.fsdp.reshard_after_forward) == (2, 2, "never")
    run = open_run_folder(resolved, "text", given)
    run.begin(0)
    run.close()
    kept = load(folder / "config.toml")
    assert (kept.mesh.dp, kept.pipeline.stages_per_rank, kept.fsdp.reshard_after_forward) == (-1, 0, "auto")
    assert kept.moe.group_sequences == resolved.moe.group_sequences
    assert opened(resolve(kept, 8)).state == "unfinished"


def test_a_runs_config_means_that_run_from_any_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative run.folder made a new run in another place, without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    begun(config_of(Path("run"), data={"corpus": "files", "path": "texts"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("../run/config.toml")
    assert Path(config.run.folder).resolve() == folder
    assert config.data.path == str(tmp_path / "texts")
    os.rename(folder, tmp_path / "moved")
    assert load("../moved/config.toml").run.folder == "../moved"
    assert load("../moved/config.toml", {"run.folder": "mine"}).run.folder == "mine"


def test_unfinished_without_checkpoint_starts_again(folder: Path) -> None:
    begun(config_of(folder))
    run = opened(config_of(folder))
    assert run.state == "unfinished"
    assert "starts at step 1 again" in run.message


def finished(config: Config, steps: int) -> None:
    run = open_run_folder(config, "text")
    run.begin(0)
    run.finish(steps)
    run.close()


def test_finished_says_what_to_do(folder: Path) -> None:
    config = config_of(folder, training={"steps": 40})
    finished(config, 40)
    run = opened(config)
    assert run.state == "finished"
    for remedy in ("--run.fresh true", "--run.folder", "--training.steps above 40"):
        assert remedy in run.message


def test_finished_goes_on_with_more_steps(folder: Path) -> None:
    finished(config_of(folder, training={"steps": 40}), 40)
    save_checkpoint(folder, 40)
    assert opened(config_of(folder, training={"steps": 60})).state == "unfinished"


def test_finished_without_checkpoint_is_kept(folder: Path) -> None:
    finished(config_of(folder, checkpoint={"enable": False}, training={"steps": 40}), 40)
    with pytest.raises(ConfigError, match="40 steps without a checkpoint"):
        opened(config_of(folder, checkpoint={"enable": False}, training={"steps": 60}))


@pytest.mark.parametrize(
    ("table", "field", "value", "named"),
    [
        ("model", "dim", 512, "model.dim = 256 there, 512 here"),
        ("model", "qk_norm", "head", "model.qk_norm = 'none' there, 'head' here"),
        ("moe", "top_k", 1, "moe.top_k = 2 there, 1 here"),
        ("moe", "layers", (1, 3), r"moe.layers = \[\] there, \[1, 3\] here"),
        ("training", "seed", 1, "training.seed = 0 there, 1 here"),
        ("training", "global_batch_size", 48, "training.global_batch_size = 24 there, 48 here"),
        ("training", "dtype", "float64", "training.dtype = 'float32' there, 'float64' here"),
        ("data", "document_mask", True, "data.document_mask = False there, True here"),
    ],
)
def test_another_run_is_refused_by_name(folder: Path, table: str, field: str, value: Any, named: str) -> None:
    begun(config_of(folder))
    before = (folder / "config.toml").read_text()
    with pytest.raises(ConfigError, match=named) as error:
        opened(config_of(folder, **{table: {field: value}}))
    assert "--run.fresh true" in error.value.remedy
    assert (folder / "config.toml").read_text() == before


def test_a_key_younger_than_the_run_counts_as_its_default(folder: Path) -> None:
    """A new key in [model] or [moe] used to make every older run another run."""
    first = begun(config_of(folder))
    text = (folder / "config.toml").read_text()
    younger = ('qk_norm = "none"\n', "gate_scale = 1.0\n", "layers = []\n")
    for line in younger:
        assert line in text
        text = text.replace(line, "")
    (folder / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"moe.gate_scale = 1.0 there, 2.0 here"):
        opened(config_of(folder, moe={"gate_scale": 2.0}))
    assert opened(config_of(folder)).run_id == first.run_id


def test_what_may_change_on_the_way(folder: Path) -> None:
    begun(config_of(folder))
    moe = {"backend": "reference", "rows": "worst", "balance_loss": 0.01, "z_loss": 1e-3, "jitter": 0.1}
    assert opened(config_of(folder, moe=moe)).state == "unfinished"


def test_other_data_is_refused(folder: Path) -> None:
    begun(config_of(folder, data={"corpus": "files", "path": "a.txt"}), "a")
    with pytest.raises(ConfigError, match=r"data.path = 'a.txt' there, 'b.txt' here"):
        opened(config_of(folder, data={"corpus": "files", "path": "b.txt"}), "b")
    with pytest.raises(ConfigError, match=r"behind data.corpus = 'files' have changed"):
        opened(config_of(folder, data={"corpus": "files", "path": "a.txt"}), "edited")
    moved = config_of(folder, data={"corpus": "files", "path": "/elsewhere/a.txt"})
    assert opened(moved, "a").state == "unfinished"


def test_a_validation_path_changes_what_a_stream_trains_on(folder: Path) -> None:
    begun(config_of(folder, data={"corpus": "datasets", "path": "name"}), "a")
    with pytest.raises(ConfigError, match=r"data.validation_path = '' there, 'held' here"):
        opened(config_of(folder, data={"corpus": "datasets", "path": "name", "validation_path": "held"}), "a")


def test_checkpoints_are_not_ignored(folder: Path) -> None:
    begun(config_of(folder))
    save_checkpoint(folder, 3)
    with pytest.raises(ConfigError, match=r"checkpoint.enable = false would ignore"):
        opened(config_of(folder, checkpoint={"enable": False}))


def test_steps_below_what_was_saved(folder: Path) -> None:
    """It used to "resume", take no step, and mark the run as finished."""
    begun(config_of(folder))
    save_checkpoint(folder, 6)
    with pytest.raises(ConfigError, match=r"training.steps = 3 is below the 6 steps"):
        opened(config_of(folder, training={"steps": 3}))
    assert opened(config_of(folder, training={"steps": 6})).state == "unfinished"


@pytest.mark.parametrize("how", ["moved", "dangling link", "another folder", "an older version's"])
def test_absence_is_no_beginning(folder: Path, tmp_path: Path, how: str) -> None:
    """Checkpoints moved away or not mounted: it started at step 1 again, and emptied metrics.jsonl."""
    run = open_run_folder(config_of(folder), "text")
    run.begin(0)
    save_checkpoint(folder, 500)
    run.note_saved(500)
    run.close()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 700}) + "\n")
    os.rename(folder / "checkpoints", tmp_path / "aside")
    config = config_of(folder)
    match how:
        case "dangling link":
            (folder / "checkpoints").symlink_to(tmp_path / "absent")
        case "another folder":
            config = config_of(folder, checkpoint={"folder": str(tmp_path / "other")})
        case "an older version's":
            old = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({key: old[key] for key in ("run_id", "data", "finished_step")}))
    with pytest.raises(ConfigError, match=r"which is not there|\(step 500\), but checkpoint.folder = .* holds none"):
        opened(config)
    assert last_step(folder / "metrics.jsonl") == 700
    (folder / "checkpoints").unlink(missing_ok=True)
    os.rename(tmp_path / "aside", folder / "checkpoints")
    assert "after step 500" in opened(config_of(folder)).message


def test_crash_between_the_two_files(folder: Path) -> None:
    begun(config_of(folder))
    (folder / "config.toml").unlink()
    assert begun(config_of(folder)).state == "new"


@pytest.mark.parametrize("content", ["", '{"run_id": 3', "[]", '{"run_id": "a"}'])
def test_a_damaged_mark_is_told(folder: Path, content: str) -> None:
    """An empty run.json was a traceback."""
    begun(config_of(folder))
    (folder / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run.json' is damaged"):
        opened(config_of(folder))


def test_a_damaged_config_is_told(folder: Path) -> None:
    begun(config_of(folder))
    (folder / "config.toml").write_text("[mod")
    with pytest.raises(ConfigError, match=r"config.toml' is damaged"):
        opened(config_of(folder))


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        opened(config_of(tmp_path / "file" / "run"))


HOLD = """
import sys, time
from pathlib import Path
from moe_dtensor.train import lease
lease.RENEW_SECONDS = 0.3
lease.Lease(Path(sys.argv[1]), "other")
print("held", flush=True)
time.sleep(120)
"""


def test_a_living_process_is_named_and_a_frozen_or_dead_one_loses_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts of one run wrote both; of a frozen and a later process, the first had the last word."""
    begun(config_of(folder))
    monkeypatch.setattr(lease, "STALE_SECONDS", 3.0)

    def hold() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    holder = hold()
    try:
        with pytest.raises(ConfigError, match=f"held by process {holder.pid} on "):
            opened(config_of(folder))
        holder.send_signal(signal.SIGSTOP)
        opened(config_of(folder))
    finally:
        holder.kill()
        holder.communicate()
    holder = hold()
    holder.kill()
    holder.communicate()
    monkeypatch.setattr(lease, "STALE_SECONDS", 1000.0)  # a dead one is not waited for
    run = open_run_folder(config_of(folder), "text")
    run.check_owner()
    (folder / ".lease.json").write_text(json.dumps({"start": "later", "pid": 7, "host": "there"}))
    with pytest.raises(RunError, match=r"lost the run in .* to process 7 on there"):
        run.begin(0)
    run.close()
    assert (folder / ".lease.json").exists()  # the later one's


def test_a_lease_that_is_out_of_sight_is_lost_only_after_a_freeze(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that hides a file for a moment ends no run."""
    run = open_run_folder(config_of(folder), "text")
    (folder / ".lease.json").unlink()
    run.begin(0)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.0)
    with pytest.raises(RunError, match=r"lost the run in .* to another process"):
        run.begin(0)
    run.close()


def test_metrics_are_cut_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end, in blocks: the file of a long run was read whole at each resume."""
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 3)
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 60)]
    whole = "\n".join(lines) + '\n{"step": 60, "lo'
    for block in (7, 50, 1 << 16):
        monkeypatch.setattr("moe_dtensor.train.sinks._BLOCK", block)
        path.write_text(whole)
        assert last_step(path) == 59
        cut_back(path, 3)
        assert path.read_text() == "".join(f"{line}\n" for line in lines[:3])
        cut_back(path, 0)
        assert path.read_text() == ""


def refusal(folder: Path) -> str:
    try:
        open_run_folder(config_of(folder, model={"dim": 512}), "text")
    except ConfigError as error:
        return f"{error.problem} {error.remedy}"
    return ""


def test_every_rank_gets_the_same_answer(folder: Path) -> None:
    begun(config_of(folder))
    answers = run_on_ranks(refusal, 2, folder)
    assert "model.dim = 256 there, 512 here" in answers[0]
    assert "--run.fresh true" in answers[0]
    assert answers[1] == answers[0]


def test_stages_that_have_begun_stay(folder: Path) -> None:
    """Later ones may change: what is still to come is no other run."""
    from moe_dtensor.config.schema import Stage

    def with_stages(*stages: Stage) -> Config:
        return replace(config_of(folder), stages=stages)

    first, second = Stage(from_step=10, lr=1e-4), Stage(from_step=50, seq_len=64)
    begun(with_stages(first, second))
    save_checkpoint(folder, 40)
    assert opened(with_stages(first, replace(second, seq_len=32))).state == "unfinished"
    assert opened(with_stages(first)).state == "unfinished"
    for stages in ((), (replace(first, lr=1e-3),), (first, Stage(from_step=30, lr=1e-5))):
        with pytest.raises(ConfigError, match="stages up to step 40"):
            opened(with_stages(*stages))
