"""A run's folder: resumes, refuses what is another run, deletes only what a run wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config, Run
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.run_folder import open_run_folder


def config_of(folder: Path, **tables: dict[str, Any]) -> Config:
    config = Config(run=Run(folder=str(folder)))
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in tables.items()})


def save_checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{step:08d}" / ".metadata").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_new(folder: Path) -> None:
    config = config_of(folder)
    run = open_run_folder(config, "text")
    assert (run.state, run.message) == ("new", "")
    assert run.checkpoints == folder / "checkpoints"
    assert load(folder / "config.toml") == config


def test_unfinished_resumes_with_another_mesh(folder: Path) -> None:
    first = open_run_folder(config_of(folder), "text")
    save_checkpoint(folder, 40)
    config = config_of(
        folder,
        mesh={"dp": 1, "tp": 4},
        training={"steps": 50, "param_dtype": "float32"},
        optimizer={"lr": 1.0},
        moe={"backend": "reference"},
        metrics={"log_interval": 5},
    )
    run = open_run_folder(config, "text")
    assert (run.state, run.run_id) == ("unfinished", first.run_id)
    assert "after step 40 of 50" in run.message
    assert load(folder / "config.toml") == config


def test_unfinished_without_checkpoint_starts_again(folder: Path) -> None:
    open_run_folder(config_of(folder), "text")
    run = open_run_folder(config_of(folder), "text")
    assert run.state == "unfinished"
    assert "starts at step 1 again" in run.message


def test_finished_says_what_to_do(folder: Path) -> None:
    config = config_of(folder, training={"steps": 40})
    open_run_folder(config, "text").finish(40)
    run = open_run_folder(config, "text")
    assert run.state == "finished"
    for remedy in ("--run.fresh true", "--run.folder", "--training.steps above 40"):
        assert remedy in run.message


def test_finished_goes_on_with_more_steps(folder: Path) -> None:
    run = open_run_folder(config_of(folder, training={"steps": 40}), "text")
    save_checkpoint(folder, 40)
    run.finish(40)
    assert open_run_folder(config_of(folder, training={"steps": 60}), "text").state == "unfinished"


def test_finished_without_checkpoint_is_kept(folder: Path) -> None:
    config = config_of(folder, checkpoint={"enable": False}, training={"steps": 40})
    open_run_folder(config, "text").finish(40)
    with pytest.raises(ConfigError, match="40 steps without a checkpoint"):
        open_run_folder(config_of(folder, checkpoint={"enable": False}, training={"steps": 60}), "text")


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
    open_run_folder(config_of(folder), "text")
    before = (folder / "config.toml").read_text()
    with pytest.raises(ConfigError, match=named) as error:
        open_run_folder(config_of(folder, **{table: {field: value}}), "text")
    assert "--run.fresh true" in error.value.remedy
    assert (folder / "config.toml").read_text() == before


def test_a_key_younger_than_the_run_counts_as_its_default(folder: Path) -> None:
    """A new key in [model] or [moe] used to make every older run another run."""
    first = open_run_folder(config_of(folder), "text")
    text = (folder / "config.toml").read_text()
    younger = ('qk_norm = "none"\n', "jitter = 0.0\n", "layers = []\n")
    for line in younger:
        assert line in text
        text = text.replace(line, "")
    (folder / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"moe.jitter = 0.0 there, 0.1 here"):
        open_run_folder(config_of(folder, moe={"jitter": 0.1}), "text")
    assert open_run_folder(config_of(folder), "text").run_id == first.run_id


def test_a_younger_key_counts_as_what_the_others_make_of_it(folder: Path) -> None:
    """A run with a bias rate always had the bias, also before there was a key that says so."""
    config = resolve(config_of(folder, moe={"bias_rate": 0.01}), 1)
    assert config.moe.selection_bias
    open_run_folder(config, "text")
    path = folder / "config.toml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "selection_bias" not in line))
    assert open_run_folder(config, "text").state == "unfinished"


def test_what_changes_no_bit_may_change(folder: Path) -> None:
    open_run_folder(config_of(folder), "text")
    again = open_run_folder(config_of(folder, moe={"backend": "reference", "rows": "worst"}), "text")
    assert again.state == "unfinished"


def test_other_data_is_refused(folder: Path) -> None:
    open_run_folder(config_of(folder, data={"corpus": "files", "path": "a.txt"}), "a")
    with pytest.raises(ConfigError, match=r"data.path = 'a.txt' there, 'b.txt' here"):
        open_run_folder(config_of(folder, data={"corpus": "files", "path": "b.txt"}), "b")
    with pytest.raises(ConfigError, match=r"behind data.corpus = 'files' have changed"):
        open_run_folder(config_of(folder, data={"corpus": "files", "path": "a.txt"}), "edited")
    moved = config_of(folder, data={"corpus": "files", "path": "/elsewhere/a.txt"})
    assert open_run_folder(moved, "a").state == "unfinished"


def test_checkpoints_are_not_ignored(folder: Path) -> None:
    open_run_folder(config_of(folder), "text")
    save_checkpoint(folder, 3)
    with pytest.raises(ConfigError, match=r"checkpoint.enable = false would ignore"):
        open_run_folder(config_of(folder, checkpoint={"enable": False}), "text")


def test_fresh_deletes_what_a_run_wrote_and_nothing_else(folder: Path) -> None:
    first = open_run_folder(config_of(folder), "text")
    save_checkpoint(folder, 3)
    (folder / "checkpoints" / ".step-00000004.partial").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "tensorboard").mkdir()
    (folder / "notes.md").write_text("mine")
    fresh = config_of(folder, run={"fresh": True}, model={"dim": 512})
    run = open_run_folder(fresh, "other")
    assert run.state == "new"
    assert run.run_id != first.run_id
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "notes.md", "run.json"]
    # Started from the file written here, the run must not delete itself.
    assert load(folder / "config.toml") == replace(fresh, run=replace(fresh.run, fresh=False))


@pytest.mark.parametrize("fresh", [False, True])
def test_foreign_folder_is_left_alone(folder: Path, fresh: bool) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no run of this program \(no run.json\)"):
        open_run_folder(config_of(folder, run={"fresh": fresh}), "text")
    assert (folder / "config.toml").read_text() == "mine"


def test_checkpoints_of_another_run(folder: Path, tmp_path: Path) -> None:
    open_run_folder(config_of(folder), "text")
    save_checkpoint(folder, 3)
    shared = config_of(tmp_path / "second", checkpoint={"folder": str(folder / "checkpoints")})
    with pytest.raises(ConfigError, match="holds checkpoints of some other run"):
        open_run_folder(shared, "text")


def test_crash_between_the_two_files(folder: Path) -> None:
    open_run_folder(config_of(folder), "text")
    (folder / "config.toml").unlink()
    assert open_run_folder(config_of(folder), "text").state == "new"


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        open_run_folder(config_of(tmp_path / "file" / "run"), "text")


def test_metrics_are_cut_back(folder: Path) -> None:
    run = open_run_folder(config_of(folder), "text")
    run.cut_back(3)
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    run.cut_back(3)
    assert (folder / "metrics.jsonl").read_text() == "".join(f"{line}\n" for line in lines[:3])


def refusal(folder: Path) -> str:
    try:
        open_run_folder(config_of(folder, model={"dim": 512}), "text")
    except ConfigError as error:
        return f"{error.problem} {error.remedy}"
    return ""


def test_every_rank_gets_the_same_answer(folder: Path) -> None:
    open_run_folder(config_of(folder), "text")
    answers = run_on_ranks(refusal, 2, folder)
    assert "model.dim = 256 there, 512 here" in answers[0]
    assert "--run.fresh true" in answers[0]
    assert answers[1] == answers[0]
