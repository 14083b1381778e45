"""Save and load the whole state of a run with torch's distributed checkpoint (DCP).

One checkpoint is ``{"model", "optimizer", "balance", "schedule", "loader", "rng", "step"}``. Model and optimizer are
keyed by parameter name and hold full tensors, in pieces, so a run on any other mesh can load them.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from moe_dtensor.checkpoint.folder import AtomicWriter, remove_partial, step_folder, whole_steps
from moe_dtensor.checkpoint.rank0 import on_rank_0
from moe_dtensor.config.schema import Config


class HasState(Protocol):
    """What the manager asks of optimizers, schedule and loader."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state."""


class CheckpointManager:
    """Checkpoints of one run, in one folder. Every method is called by all ranks together.

    Args:
        folder: holds ``step-<step>`` folders; made when needed.
        config: ``[checkpoint]`` says how many to keep and whether to write in the background.
        parts: the model parts of this rank.
        optimizers: their optimizers; flat state by parameter name.
        schedule: learning-rate schedule, the same on every rank.
        loader: its state is the same on every rank and fits JSON.
        balance: of the routers; its state is the same on every rank.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Config,
        parts: list[nn.Module],
        optimizers: HasState,
        schedule: HasState,
        loader: HasState,
        balance: HasState,
    ) -> None:
        self.folder = Path(folder)
        self._options = config.checkpoint
        self._parts = parts
        self._optimizers = optimizers
        self._schedule = schedule
        self._loader = loader
        self._balance = balance
        self._writing: Any = None
        # A group of its own: a write in the background must not mix with the step's collectives.
        self._group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.comm.timeout_seconds))

    def replace(self, parts: list[nn.Module], optimizers: HasState, schedule: HasState, balance: HasState) -> None:
        """Go on with other parts of the same model, once the last ``save`` is on disk."""
        self.wait()
        self._parts, self._optimizers, self._schedule, self._balance = parts, optimizers, schedule, balance

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps; older checkpoints beyond ``keep_last`` are deleted.

        In the background (``async_save``) the state is copied before this returns; a failure of the write
        is raised by the next ``save`` or ``wait``.
        """
        self.wait()
        on_rank_0(lambda: remove_partial(self.folder), self._group)
        state = {**self._tensors(), **self._values(step)}
        writer = AtomicWriter(self.folder, step, self._options.keep_last)
        if self._options.async_save:
            self._writing = dcp.async_save(state, storage_writer=writer, process_group=self._group)
        else:
            dcp.save(state, storage_writer=writer, process_group=self._group)

    def wait(self) -> None:
        """Return once the last ``save`` is on disk. Call before the process ends."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None; the same on every rank."""
        steps = on_rank_0(lambda: whole_steps(self.folder), self._group)
        return steps[-1] if steps else None

    def load_latest(self) -> int | None:
        """Restore the newest whole checkpoint into the parts given at construction.

        Returns:
            Steps that the restored run has taken; None, and nothing changed, if there is no checkpoint.
        """
        step = self.latest()
        if step is not None:
            self.load(step)
        return step

    def load(self, step: int) -> None:
        """Restore the checkpoint of ``step``, whatever mesh wrote it."""
        reader = dcp.FileSystemReader(step_folder(self.folder, step))
        state = {**self._tensors(), **self._values(step)}
        # The generators belong to ranks: those of another number of ranks mean nothing here.
        saved = reader.read_metadata().state_dict_metadata
        if any(f"rng.{_rng_key()}.{device}" not in saved for device in state["rng"][_rng_key()]):
            del state["rng"]
        dcp.load(state, storage_reader=reader, process_group=self._group)
        for part in self._parts:
            # Not strict: each part takes its own keys from those of all parts.
            set_model_state_dict(part, dict(state["model"]), options=StateDictOptions(strict=False))
        self._optimizers.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._loader.load_state_dict(json.loads(state["loader"]))
        self._balance.load_state_dict(state["balance"])
        if "rng" in state:
            _set_rng(state["rng"][_rng_key()])

    def _tensors(self) -> dict[str, Any]:
        """Model and optimizer state; the tensors are the live ones."""
        model = {name: value for part in self._parts for name, value in get_model_state_dict(part).items()}
        return {"model": model, "optimizer": self._optimizers.state_dict(), "balance": self._balance.state_dict()}

    def _values(self, step: int) -> dict[str, Any]:
        return {
            "schedule": self._schedule.state_dict(),
            # One string: its inner structure may differ between the moment of saving and that of loading.
            "loader": json.dumps(self._loader.state_dict()),
            "rng": {_rng_key(): _rng()},
            "step": step,
        }


def _rng_key() -> str:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return f"rank_{rank}_of_{ranks}"


def _rng() -> dict[str, torch.Tensor]:
    """States of torch's generators of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
