"""The folder of a run: what it holds, and whether a config may go on in it.

``run.json`` marks a folder as a run's; ``config.toml`` is its config. A run that is not finished resumes. Mesh,
precision of the computation, optimizer, steps and logging may change on the way; what makes it another run
(:func:`moe_dtensor.train.kept_config.differences`) may not. A folder becomes a run's with the first step taken in it.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_dtensor.checkpoint.folder import on_rank_0, owners, remove_all, whole_steps, write_small
from moe_dtensor.checkpoint.proof import STAMP_FILE
from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.config.load import dump
from moe_dtensor.config.schema import Config
from moe_dtensor.train.kept_config import changed_past, data_differences, differences, to_keep, with_defaults
from moe_dtensor.train.lease import LEASE_FILE, Lease
from moe_dtensor.train.profile import PROFILE_FOLDER
from moe_dtensor.train.sinks import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_FOLDER, cut_back, last_step

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
HANG_FOLDER = "hangs"
EXPORT_FOLDER = "hugging_face"
"""Where ``checkpoint.export_hf`` writes."""


@dataclass
class RunFolder:
    """A run's folder, checked, and held against other processes."""

    path: Path
    checkpoints: Path
    """Folder of the checkpoints."""
    state: Literal["new", "unfinished", "finished"]
    message: str
    """What to tell the user; empty for a new run."""
    run: dict[str, Any]
    """What run.json holds, or will."""
    config: Config
    """To be written."""
    start_id: str
    """Of this start of the run."""
    fresh: bool = False
    """Whether the run that is there is deleted when this one takes its first step."""
    lease: Lease | None = field(default=None, repr=False)
    """On rank 0."""
    made: list[Path] = field(default_factory=list)
    """Folders made for the lease: they go again if no step is taken."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lease": None}  # other ranks hold none

    @property
    def run_id(self) -> str:
        """Stays the same when the run resumes."""
        return self.run["run_id"]

    def check_owner(self) -> None:
        """Raise RunError if another process has taken the run over. Rank 0 only."""
        if self.lease is not None:
            self.lease.check()

    def begin(self, step: int) -> None:
        """Make the folder this run's: a step has been taken after ``step`` of before. Rank 0 only.

        A fresh start deletes what was there; a resumed run drops the metrics of steps after ``step``.
        """
        self.check_owner()
        try:
            if self.fresh:
                _clear(self.path, self.checkpoints)
                self.fresh = False
            elif self.state == "unfinished":
                cut_back(self.path / METRICS_FILE, step)
            # The config comes last: without it the folder is as good as new.
            self._write_run()
            write_small(self.path / CONFIG_FILE, dump(self.config))
        except OSError as error:
            raise RunError(
                f"run.folder = {str(self.path)!r} cannot be written: {error.strerror}: {error.filename}.",
                "Make room in it, or set run.folder to another folder.",
            ) from None
        self.made = []

    def note_saved(self, step: int) -> None:
        """Note the newest checkpoint, so that its absence is noticed. Rank 0 only."""
        if self.run.get("saved_step") != step:
            self.run["saved_step"] = step
            self._write_run()

    def finish(self, step: int) -> None:
        """Note that the run is complete with ``step`` steps. Rank 0 only."""
        self.check_owner()
        self.run["finished_step"] = step
        self._write_run()

    def close(self) -> None:
        """Let another process hold the run. Rank 0 only."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None
            for folder in reversed(self.made):
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _write_run(self) -> None:
        write_small(self.path / RUN_FILE, json.dumps(self.run))


def open_run_folder(config: Config, fingerprint: str, given: Config | None = None) -> RunFolder:
    """Check the folder of a run and hold it. Called by all ranks together.

    Args:
        config: resolved, with the vocabulary's size filled in.
        fingerprint: of the training data; the folder keeps it.
        given: the config before it was resolved: what hangs on the mesh is written as it stands there.

    Raises:
        ConfigError: the folder is not a run's, is a run of another model or data, is held by another process, or
            cannot be written. The same on every rank.
    """

    def prepare() -> RunFolder:
        try:
            return _open(config, fingerprint, to_keep(config, given or config))
        except OSError as error:
            raise ConfigError(
                f"run.folder = {config.run.folder!r} cannot be used: {error.strerror}: {error.filename}.",
                "Set run.folder to a folder that can be written.",
            ) from None

    return on_rank_0(prepare)


def _open(config: Config, fingerprint: str, kept: Config) -> RunFolder:
    path = Path(config.run.folder)
    checkpoints = path / config.checkpoint.folder
    if path.is_dir() and not (path / RUN_FILE).is_file() and any(map(_is_foreign, path.iterdir())):
        raise ConfigError(
            f"run.folder = {str(path)!r} is not empty and holds no run of this program (no {RUN_FILE}).",
            "Set run.folder to an empty or a new folder.",
        )
    made = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    start_id = uuid.uuid4().hex[:12]
    lease = Lease(path, start_id)
    run: dict[str, Any] = {
        "run_id": uuid.uuid4().hex[:12],
        "data": fingerprint,
        "finished_step": None,
        "saved_step": None,
    }
    run |= {"format": 2, "started_by": os.environ.get("MOE_DTENSOR_START")}
    folder = RunFolder(path, checkpoints, "new", "", run, kept, start_id, lease=lease, made=made)
    try:
        _check_place(checkpoints)
        old = read_run(path)
        if old is not None and config.run.fresh and not _is_restart(old):
            _check_owners(checkpoints, old, path)
            folder.fresh = True
        # Without a config the folder is as good as new: it is written last and deleted first.
        elif old is not None and (path / CONFIG_FILE).is_file():
            _go_on(folder, old, config, fingerprint)
        else:
            _check_owners(checkpoints, old or {}, path)
    except BaseException:
        folder.close()
        raise
    return folder


def _is_foreign(entry: Path) -> bool:
    """Whether what lies in a folder that is no run's yet keeps it from becoming one: all but a stamp, made before."""
    return not entry.name.startswith(".") and entry.name != STAMP_FILE


def read_run(path: Path) -> dict[str, Any] | None:
    """What a folder's run.json holds; None if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"run_id", "data", "finished_step"} <= content.keys():
            return content
        problem = "it lacks run_id, data or finished_step"
    except FileNotFoundError:
        return None
    except ValueError as error:
        problem = str(error)
    raise ConfigError(
        f"{str(path / RUN_FILE)!r} is damaged: {problem}.",
        "Put a copy of it back, or set run.folder to another folder.",
    )


def kept_revisions(config: Config) -> dict[str, str] | None:
    """By path, the commits of hub names that the run in ``run.folder`` reads; None where no run there goes on."""
    path = Path(config.run.folder)
    run = read_run(path)
    if run is None or (config.run.fresh and not _is_restart(run)):
        return None
    try:
        data = with_defaults(tomllib.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))["data"]
    except (OSError, ValueError):
        return None  # absent: as good as new; damaged: told when the folder is opened
    return {part["path"]: part["revision"] for part in (data, *data["sources"])}


def _is_restart(run: dict[str, Any]) -> bool:
    """Whether the launcher or Slurm started this command again by itself: it must not start over again."""
    started_by = os.environ.get("MOE_DTENSOR_START")
    return (
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        or (started_by is not None and run.get("started_by") == started_by)
    )


def _check_place(checkpoints: Path) -> None:
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise ConfigError(
            f"checkpoint.folder = {str(checkpoints)!r} is a link to {os.readlink(checkpoints)!r}, which is not there.",
            "Mount what it links to, or remove the link.",
        )


def _check_owners(checkpoints: Path, run: dict[str, Any], path: Path) -> None:
    """Refuse a place that holds what may be another run's checkpoints."""
    inside = path.resolve() in checkpoints.resolve().parents
    old = run.get("unsigned_until", 10**12 if run and "format" not in run else -1)
    for step, owner in owners(checkpoints).items():
        # One that bears no name is this run's if an older version may have written it here.
        if owner is None and run and (inside or step <= old):
            continue
        if owner is None or owner != run.get("run_id"):
            raise ConfigError(
                f"checkpoint.folder = {str(checkpoints)!r} holds checkpoints of some other run"
                f"{f' ({owner})' if owner else ''}.",
                "Set checkpoint.folder to a folder of this run alone; the default lies inside run.folder.",
            )


def _go_on(folder: RunFolder, old: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Check that ``config`` goes on with the run that is there, and take over its id."""
    _check_same_run(folder.path, config, old["data"], fingerprint)
    _check_owners(folder.checkpoints, old, folder.path)
    saved = list(owners(folder.checkpoints))
    folder.run = {**folder.run, **old, "started_by": folder.run["started_by"], "format": 2}
    if "format" not in old and saved:
        folder.run["unsigned_until"] = saved[-1]
    folder.state, folder.message = _progress(folder, old, config, saved)


def _check_same_run(path: Path, config: Config, old_data: str, data: str) -> None:
    try:
        old = with_defaults(tomllib.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(
            f"{str(path / CONFIG_FILE)!r} is damaged: {error}.", "Put a copy of it back, or set run.folder to another."
        ) from None
    new = asdict(config)
    found = differences(old, new)
    if saved := whole_steps(path / config.checkpoint.folder):
        found += changed_past(old, new, saved[-1])
    if old_data != data:
        found += data_differences(old, with_defaults(new)) or [
            f"the documents or the tokenizer behind data.corpus = {config.data.corpus!r} have changed"
        ]
    if found:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds another run: " + "; ".join(found) + ".",
            "Set run.folder to another folder, or start over in this one with --run.fresh true.",
        )


def _progress(
    folder: RunFolder, run: dict[str, Any], config: Config, saved: list[int]
) -> tuple[Literal["unfinished", "finished"], str]:
    steps, path, finished_step = config.training.steps, folder.path, run["finished_step"]
    start_over = "start over in this one with --run.fresh true."
    if finished_step is not None and finished_step >= steps:
        return "finished", (
            f"The run in {path} is finished ({finished_step} steps). To train again: --run.fresh true starts over, "
            f"--run.folder names another folder; to go on: --training.steps above {finished_step}."
        )
    if saved and not config.checkpoint.enable:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds checkpoints, and checkpoint.enable = false would ignore them.",
            f"Set checkpoint.enable = true to resume, or {start_over}",
        )
    if finished_step is not None and not saved and run.get("saved_step") is None:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds a run of {finished_step} steps without a checkpoint to go on from.",
            f"Set run.folder to another folder, or {start_over}",
        )
    if saved and saved[-1] > steps:
        raise ConfigError(
            f"training.steps = {steps} is below the {saved[-1]} steps that the run in {str(path)!r} has saved.",
            f"Set training.steps to {saved[-1]} or more, or {start_over}",
        )
    if saved:
        return "unfinished", f"Resuming the run in {path} after step {saved[-1]} of {steps}."
    if missing := _missing_step(run, folder, config):
        raise ConfigError(
            f"the run in {str(path)!r} has saved a checkpoint (step {missing}), but "
            f"checkpoint.folder = {str(folder.checkpoints)!r} holds none.",
            f"Mount it or put it back, set checkpoint.folder to where it is, or {start_over}",
        )
    return "unfinished", f"The run in {path} has no checkpoint yet; it starts at step 1 again."


def _missing_step(run: dict[str, Any], folder: RunFolder, config: Config) -> int:
    """The step of a checkpoint that must have been there; 0 if none was."""
    if run.get("saved_step") is not None:
        return run["saved_step"]
    if "format" in run or run["finished_step"] is not None:
        return run["finished_step"] or 0
    # An older version noted no saves: its metrics tell how far it came.
    last = last_step(folder.path / METRICS_FILE)
    return last // config.checkpoint.interval * config.checkpoint.interval


def _clear(path: Path, checkpoints: Path) -> None:
    """Delete what a run wrote, the mark last; other files stay."""
    run = read_run(path)
    if run is None:
        return
    remove_all(checkpoints, run["run_id"])
    for name in (TENSORBOARD_FOLDER, WANDB_FOLDER, PROFILE_FOLDER, HANG_FOLDER, EXPORT_FOLDER):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (METRICS_FILE, CONFIG_FILE, RUN_FILE):
        (path / name).unlink(missing_ok=True)


__all__ = ["CONFIG_FILE", "HANG_FOLDER", "LEASE_FILE", "RUN_FILE", "RunFolder", "open_run_folder", "read_run"]
