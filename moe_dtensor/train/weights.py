"""Weights that a run starts from (``checkpoint.initial``) and leaves as a Hugging Face folder (``export_hf``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_dtensor.checkpoint.folder import step_folder
from moe_dtensor.checkpoint.hugging_face.convert import Export
from moe_dtensor.checkpoint.hugging_face.export import appear
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, same_function_problems
from moe_dtensor.checkpoint.native import CONFIG_FILE, NativeFolder, NativeWeights, find_native
from moe_dtensor.checkpoint.rank0 import on_rank_0
from moe_dtensor.checkpoint.storage import Reader
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.initial import held_slices
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


def load_initial(trainer: Trainer, source: HuggingFaceSource | NativeFolder) -> None:
    """Fill a trainer's parameters and biases."""
    load_weights(trainer.parts, trainer.balance, trainer.config, source)


@torch.no_grad()
def load_weights(
    parts: Iterable[nn.Module], balance: BalanceState, config: Config, source: HuggingFaceSource | NativeFolder
) -> None:
    """Fill this rank's part of every parameter, and the biases that the choice sees. Called by all ranks together."""
    params = {name: param for part in parts for name, param in part.named_parameters()}
    if isinstance(source, NativeFolder):
        _load_native(balance, params, source)
        return
    for name, param in params.items():
        local = param.to_local() if isinstance(param, DTensor) else param
        held = [(part.start, part.stop) for part in held_slices(param)]
        # By way of host memory: one tensor of this rank's share beyond the share itself.
        part = torch.empty(local.shape, dtype=local.dtype)
        source.read(name, held, part)
        local.copy_(part)
    for row, layer in enumerate(sorted(moe_layers(config))):
        bias_E = torch.zeros(config.moe.num_experts)
        source.read(f"layers.{layer}.moe.router.bias", [(0, len(bias_E))], bias_E)
        balance.bias_LE[row].copy_(bias_E)


def _load_native(balance: BalanceState, params: Mapping[str, Tensor], source: NativeFolder) -> None:
    weights = NativeWeights(source.checkpoint)
    held = set(weights.names())
    tensors = {name: param.detach() for name, param in params.items()}
    _load(source.checkpoint, {name: tensor for name, tensor in tensors.items() if name in held})
    if "output.weight" not in held:
        # The folder's head is its embedding; only the last stage has one to fill.
        head = tensors.get("output.weight")
        _load(source.checkpoint, {} if head is None else {"tok_embeddings.weight": head})
    bias_LE = weights.bias_LE()
    rows = len(balance.bias_LE)
    if bias_LE[:rows].shape == balance.bias_LE.shape:  # a folder may have those of multi-token prediction beside
        balance.bias_LE.copy_(bias_LE[:rows])


def _load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    dcp.load({"model": tensors}, storage_reader=Reader(checkpoint))


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
