"""Weights that a run starts from (``checkpoint.initial``) and leaves as a Hugging Face folder (``export_hf``)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from moe_dtensor.checkpoint.folder import on_rank_0, step_folder
from moe_dtensor.checkpoint.hugging_face.export import Export, appear
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, same_function_problems
from moe_dtensor.checkpoint.native import CONFIG_FILE, NativeFolder, find_native
from moe_dtensor.checkpoint.weights import load_weights
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.run_folder import EXPORT_FOLDER, RUN_FILE


def open_initial(config: Config) -> HuggingFaceSource | NativeFolder:
    """What ``checkpoint.initial`` names, checked against the run. The same on every rank.

    Raises:
        ConfigError: neither a Hugging Face nor a native folder; it computes something else than the run's config; a
            tensor is missing or left over.
    """
    folder = Path(config.checkpoint.initial)
    is_native = (folder / CONFIG_FILE).is_file() or folder.name.startswith("step-")
    source = find_native(folder) if is_native else HuggingFaceSource(folder, config)
    theirs = source.config if isinstance(source, NativeFolder) else source.own_config
    problems = same_function_problems(config, theirs)
    if problems:
        raise ConfigError(
            f"checkpoint.initial = {str(folder)!r} holds weights of another model: {'; '.join(problems)}.",
            "Set these keys as the folder has them; convert --config-only writes them.",
        )
    return source


def load_initial(trainer: Trainer, config: Config) -> None:
    """Fill a trainer's parameters and biases from ``checkpoint.initial``, if there is one."""
    if config.checkpoint.initial:
        load_weights(trainer.parts, trainer.balance, trainer.config, open_initial(config))


def check_weights(config: Config) -> None:
    """Raise ConfigError for weights that cannot be started from or left, before a new run's folder is made."""

    def check() -> None:
        plan_export(config, Path())
        if config.checkpoint.initial and not (Path(config.run.folder) / RUN_FILE).is_file():
            open_initial(config)

    on_rank_0(check)


def plan_export(config: Config, checkpoints: Path) -> Export | None:
    """What the run will leave, checked before it begins; None without ``checkpoint.export_hf``."""
    if not config.checkpoint.export_hf:
        return None
    return Export(config, step_folder(checkpoints, config.training.steps))


def write_export(exported: Export, run_folder: Path) -> Path:
    """Write the folder out of the last checkpoint: every rank some of the shards, rank 0 the rest.

    Raises:
        RuntimeError: a rank could not write; on every rank.
    """
    folder, hidden = run_folder / EXPORT_FOLDER, run_folder / f".{EXPORT_FOLDER}.partial"

    def begin() -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)

    on_rank_0(begin)
    failure = ""
    try:
        exported.write_shards(hidden, (dist.get_rank(), dist.get_world_size()))
    except (OSError, ConfigError) as error:
        failure = str(error)
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise RuntimeError(f"checkpoint.export_hf: {next(filter(None, failures))}")

    def end() -> None:
        exported.write_rest(hidden)
        shutil.rmtree(folder, ignore_errors=True)
        appear(hidden, folder)

    on_rank_0(end)
    return folder
