"""The folder of a run: what it holds, and whether a config may go on in it.

``run.json`` marks a folder as a run's; ``config.toml`` is its resolved config. A run that is not finished
resumes. Mesh, precision of the computation, optimizer, steps and logging may change on the way; what makes
it another run (:func:`differences`) may not.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_dtensor.checkpoint.folder import remove_all, whole_steps
from moe_dtensor.checkpoint.rank0 import on_rank_0
from moe_dtensor.config.build import build
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import dump
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import tables
from moe_dtensor.train.profile import PROFILE_FOLDER
from moe_dtensor.train.sinks import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_FOLDER

CONFIG_FILE = "config.toml"
RUN_FILE = "run.json"
EXPORT_FOLDER = "hugging_face"
"""Where ``checkpoint.export_hf`` writes."""
_FREE_KEYS = {"model": {"attention_backend"}, "rope": set[str](), "moe": {"backend", "rows"}}
_FIXED_KEYS = {
    "data": ("document_mask", "packing", "sources"),
    "training": ("seed", "seq_len", "global_batch_size", "dtype", "loss"),
}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, checked and open to write."""

    path: Path
    checkpoints: Path
    """Folder of the checkpoints."""
    run_id: str
    """Stays the same when the run resumes."""
    state: Literal["new", "unfinished", "finished"]
    message: str
    """What to tell the user; empty for a new run."""

    def cut_back(self, step: int) -> None:
        """Drop metrics of steps after ``step``: they are about to be taken again. Rank 0 only."""
        path = self.path / METRICS_FILE
        if not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        _write(path, "".join(f"{line}\n" for line in kept))

    def finish(self, step: int) -> None:
        """Note that the run is complete with ``step`` steps. Rank 0 only."""
        path = self.path / RUN_FILE
        _write(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), "finished_step": step}))


def open_run_folder(config: Config, fingerprint: str) -> RunFolder:
    """Make or check the folder of a run and write the resolved config into it. Called by all ranks together.

    Args:
        config: resolved, with the vocabulary's size filled in.
        fingerprint: of the training data; the folder keeps it.

    Raises:
        ConfigError: the folder is not a run's, is a run of another model or data, or cannot be written. The
            same on every rank.
    """

    def prepare() -> RunFolder:
        try:
            return _open(config, fingerprint)
        except OSError as error:
            raise ConfigError(
                f"run.folder = {config.run.folder!r} cannot be used: {error.strerror}: {error.filename}.",
                "Set run.folder to a folder that can be written.",
            ) from None

    return on_rank_0(prepare)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that make ``new`` another run than ``old``, as ``table.key = old there, new here``.

    Fixed are ``[model]``, ``[rope]`` and ``[moe]`` but for how they are computed, and of ``[data]`` and ``[training]``
    what decides a step's tokens and the master weights' precision. A key that ``old``, written by an older version,
    lacks counts as its default there. ``old`` is what a run's config.toml holds, ``new`` the tables of a resolved
    config.
    """
    old, new = with_defaults(old), with_defaults(new)
    keys = [(table, key) for table, free in _FREE_KEYS.items() for key in new[table] if key not in free]
    keys += [(table, key) for table, fixed in _FIXED_KEYS.items() for key in fixed]
    pairs = [(f"{table}.{key}", _toml(old[table][key]), _toml(new[table][key])) for table, key in keys]
    return [f"{name} = {there!r} there, {here!r} here" for name, there, here in pairs if there != here]


def changed_past(old: dict[str, Any], new: dict[str, Any], steps: int) -> list[str]:
    """What of the data's order in the first ``steps`` steps ``new`` would change; arguments as :func:`differences`."""
    old, new = with_defaults(old), with_defaults(new)
    begun, now = ([stage for stage in x["stages"] if stage["from_step"] <= steps] for x in (old, new))
    found = [f"stages up to step {steps} = {begun!r} there, {now!r} here"] if begun != now else []
    there, here = old["training"]["steps"], new["training"]["steps"]
    if there != here and any(source["tokens"] for source in new["data"]["sources"]):
        found.append(f"training.steps = {there} there, {here} here, of which data.sources.*.tokens are shares")
    return found


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The tables of a run's config.toml with every key of today: unknown ones left out, missing ones at their default.

    Defaults are resolved as any config's; a resolved config names its own dp, so the number of ranks plays no part.
    """
    known = {
        name: {key: value for key, value in values.get(name, {}).items() if key in table.fields}
        for name, table in tables().items()
    }
    known["data"] |= {"sources": values.get("data", {}).get("sources", ())}
    return asdict(resolve(build({**known, "stages": values.get("stages", ())}), 1))


def _open(config: Config, fingerprint: str) -> RunFolder:
    path = Path(config.run.folder)
    checkpoints = path / config.checkpoint.folder
    if path.is_dir() and not (path / RUN_FILE).is_file() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise ConfigError(
            f"run.folder = {str(path)!r} is not empty and holds no run of this program (no {RUN_FILE}).",
            "Set run.folder to an empty or a new folder.",
        )
    if config.run.fresh:
        _clear(path, checkpoints)
    # The config is written last and deleted first: without it the folder is as good as new.
    if not (path / CONFIG_FILE).is_file():
        return _open_new(path, checkpoints, config, fingerprint)
    run = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    _check_same_run(path, config, run["data"], fingerprint)
    state, message = _progress(path, checkpoints, config, run["finished_step"])
    if state == "unfinished":
        _write_config(path, config)
    return RunFolder(path, checkpoints, run["run_id"], state, message)


def _open_new(path: Path, checkpoints: Path, config: Config, fingerprint: str) -> RunFolder:
    if whole_steps(checkpoints):
        raise ConfigError(
            f"checkpoint.folder = {str(checkpoints)!r} holds checkpoints of some other run.",
            "Set checkpoint.folder to a folder of this run alone; the default lies inside run.folder.",
        )
    path.mkdir(parents=True, exist_ok=True)
    run_id = uuid.uuid4().hex[:12]
    _write(path / RUN_FILE, json.dumps({"run_id": run_id, "data": fingerprint, "finished_step": None}))
    _write_config(path, config)
    return RunFolder(path, checkpoints, run_id, "new", "")


def _check_same_run(path: Path, config: Config, old_data: str, data: str) -> None:
    old = tomllib.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    new = asdict(config)
    found = differences(old, new)
    if saved := whole_steps(path / config.checkpoint.folder):
        found += changed_past(old, new, saved[-1])
    if old_data != data:
        there, here = with_defaults(old)["data"], with_defaults(new)["data"]
        changed = [
            f"data.{key} = {there[key]!r} there, {value!r} here" for key, value in here.items() if there[key] != value
        ]
        found += changed or [f"the documents or the tokenizer behind data.corpus = {config.data.corpus!r} have changed"]
    if found:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds another run: " + "; ".join(found) + ".",
            "Set run.folder to another folder, or start over in this one with --run.fresh true.",
        )


def _progress(
    path: Path, checkpoints: Path, config: Config, finished_step: int | None
) -> tuple[Literal["unfinished", "finished"], str]:
    steps = config.training.steps
    if finished_step is not None and finished_step >= steps:
        return "finished", (
            f"The run in {path} is finished ({finished_step} steps). To train again: --run.fresh true starts over, "
            f"--run.folder names another folder; to go on: --training.steps above {finished_step}."
        )
    saved = whole_steps(checkpoints)
    if saved and not config.checkpoint.enable:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds checkpoints, and checkpoint.enable = false would ignore them.",
            "Set checkpoint.enable = true to resume, or start over with --run.fresh true.",
        )
    if finished_step is not None and not saved:
        raise ConfigError(
            f"run.folder = {str(path)!r} holds a run of {finished_step} steps without a checkpoint to go on from.",
            "Set run.folder to another folder, or start over in this one with --run.fresh true.",
        )
    if saved:
        return "unfinished", f"Resuming the run in {path} after step {saved[-1]} of {steps}."
    return "unfinished", f"The run in {path} has no checkpoint yet; it starts at step 1 again."


def _clear(path: Path, checkpoints: Path) -> None:
    """Delete what a run writes, the mark last; other files stay."""
    if not (path / RUN_FILE).is_file():
        return
    remove_all(checkpoints)
    for name in (TENSORBOARD_FOLDER, WANDB_FOLDER, PROFILE_FOLDER, EXPORT_FOLDER):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (METRICS_FILE, CONFIG_FILE, RUN_FILE):
        (path / name).unlink(missing_ok=True)


def _write_config(path: Path, config: Config) -> None:
    # Started from this file, a run resumes; it must not delete itself again.
    _write(path / CONFIG_FILE, dump(replace(config, run=replace(config.run, fresh=False))))


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole, so that no reader and no crash sees half of it."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _step_of(line: str) -> float:
    """Step of a metrics record; infinite for a line cut short by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _toml(value: Any) -> Any:
    """The value as TOML gives it back."""
    return list(value) if isinstance(value, tuple) else value
