"""What a run's checkpoints begin from, carry and leave: weights to start from (``checkpoint.initial``), a file that
says where a checkpoint comes from, and a Hugging Face folder after the last (``checkpoint.export_hf``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.checkpoint.folder import on_rank_0, step_folder
from moe_dtensor.checkpoint.hugging_face.export import Export, appear
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, same_function_problems
from moe_dtensor.checkpoint.native import CONFIG_FILE, NativeFolder, find_native
from moe_dtensor.checkpoint.proof import PROOF_FILE, proof_text, read_stamp
from moe_dtensor.checkpoint.weights import load_weights
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import dump
from moe_dtensor.config.schema import Config
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.run_folder import EXPORT_FOLDER, RUN_FILE, RunFolder


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


def carried_files(
    folder: RunFolder,
    config: Config,
    device: torch.device,
    step: int,
    routing: Mapping[str, Value],
    warn: Callable[[str], None],
) -> dict[str, str]:
    """Name and text of the file that a checkpoint carries. Rank 0's work; reads ``routing`` from the device.

    Args:
        config: of the step, resolved on this run's mesh.
        routing: diagnostics of the step's MoE blocks by name, ``(L,)`` each.
        warn: takes what is wrong with the run's stamp: the checkpoint then carries none.
    """
    try:
        stamp = read_stamp(folder.path)
    except (OSError, ValueError) as error:
        warn(f"warning: the checkpoint of step {step} carries no proof: {error}.")
        stamp = None
    mesh = config.mesh
    saved = {
        "run_id": folder.run_id,
        "step": step,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "mesh": f"{mesh.dp}x{mesh.pp}x{mesh.tp}",
        "schedule": config.pipeline.schedule if mesh.pp > 1 else "none",
        "config": dump(folder.config),
        "data": folder.run["data"],
        "routing": {name: value.tolist() if isinstance(value, Tensor) else value for name, value in routing.items()},
    }
    return {PROOF_FILE: proof_text(stamp, saved)}


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
