"""A native checkpoint by itself: found from a run's folder, read and written tensor by tensor, without a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from moe_dtensor.checkpoint.folder import Manifest, step_folder, whole_steps
from moe_dtensor.checkpoint.storage import Reader, TensorsPlanner, write_alone
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class NativeFolder:
    """A folder with a ``config.toml`` and checkpoints: a run's, or a converted one."""

    path: Path
    config: Config
    """Resolved for one rank."""
    checkpoint: Path
    """``step-<step>``: the newest, or the one that was named."""


def find_native(path: str | Path) -> NativeFolder:
    """The run or checkpoint that a path names.

    Raises:
        ConfigError: it is neither, or has no whole checkpoint.
    """
    path = Path(path)
    remedy = f"Give a folder with {CONFIG_FILE} and checkpoints, or one of its step-<step> folders."
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder.", remedy)
    for folder in (path, *path.resolve().parents[:3]):
        if (folder / CONFIG_FILE).is_file():
            break
    else:
        raise ConfigError(f"{path} holds no {CONFIG_FILE}, nor does a folder above it.", remedy)
    config = load(folder / CONFIG_FILE)
    config = replace(config, mesh=replace(config.mesh, dp=1, pp=1, tp=1, dp_replicate=1, expert_ranks=0))
    if folder is path:
        checkpoints = path / config.checkpoint.folder
        steps = whole_steps(checkpoints)
        if not steps:
            raise ConfigError(f"{checkpoints} has no whole checkpoint.", remedy)
        return NativeFolder(folder, resolve(config, 1), step_folder(checkpoints, steps[-1]))
    if not path.name.startswith("step-"):
        raise ConfigError(f"{path} is no checkpoint.", remedy)
    return NativeFolder(folder, resolve(config, 1), path)


class NativeWeights:
    """The weights of one checkpoint, whatever mesh wrote it. Loads one tensor at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        entries = Reader(checkpoint).read_metadata().state_dict_metadata
        self.entries = {name: e for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def names(self) -> list[str]:
        """Of the model's parameters."""
        return [name.removeprefix("model.") for name in self.entries if name.startswith("model.")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return tuple(self.entries[f"model.{name}"].size)

    def dtype(self, name: str) -> torch.dtype:
        """As saved."""
        return self.entries[f"model.{name}"].properties.dtype

    def read(self, name: str) -> Tensor:
        """A whole parameter."""
        return self._read(f"model.{name}")

    def bias_LE(self) -> Tensor:
        """Biases that the choice sees, of every MoE block; float32."""
        return self._read("balance.bias")

    def read_all(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the checkpoint by table (model, optimizer, balance) and name."""
        tables: dict[str, dict[str, Tensor]] = {}
        for key, entry in self.entries.items():
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with alone():
            dcp.load(tables, storage_reader=Reader(self.path), planner=TensorsPlanner(), no_dist=True)
        return tables

    def _read(self, key: str) -> Tensor:
        entry = self.entries[key]
        out = torch.empty(entry.size, dtype=entry.properties.dtype)
        table, _, name = key.partition(".")
        with alone():
            dcp.load({table: {name: out}}, storage_reader=Reader(self.path), no_dist=True)
        return out


def write_native(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    values: Callable[[str], Tensor],
    balance: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint of weights alone, of step 0; no more than one tensor is held.

    Args:
        folder: of checkpoints.
        shapes: shape and dtype of every parameter by name.
        values: gives a parameter when its turn comes.
        balance: as :class:`moe_dtensor.model.balance_state.BalanceState` saves it.
    """
    model = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    state = {"model": model, "balance": dict(balance)}
    writer = write_alone(folder, Manifest("converted", "", 0), file_per_tensor=True)
    with alone():
        dcp.save(state, storage_writer=writer, planner=_OneByOne(values), no_dist=True)


@contextmanager
def alone() -> Iterator[None]:
    """DCP warns where it runs in one process, as is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _OneByOne(DefaultSavePlanner):
    """Asks for a parameter when it is to be written, not before."""

    def __init__(self, values: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The parameter in place of its outline."""
        if index.fqn.startswith("model."):
            return self._values(index.fqn.removeprefix("model."))
        return super().lookup_object(index)
