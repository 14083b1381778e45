"""Save and load the whole state of a run with torch's distributed checkpoint (DCP).

One checkpoint is ``{"model", "optimizer", "balance", "rng"}``, tensors all, and a manifest with the rest. Model and
optimizer are keyed by parameter name and hold full tensors, in pieces, so a run on any other mesh can load them.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from moe_dtensor.checkpoint.folder import (
    Manifest,
    damage,
    on_rank_0,
    partial_folder,
    read_manifest,
    remove_partial,
    remove_step,
    step_folder,
    whole_steps,
)
from moe_dtensor.checkpoint.planner import PlanKeeper
from moe_dtensor.checkpoint.storage import Reader, TensorsPlanner, Writer
from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.config.schema import Config

LATE_SECONDS = 30.0
"""How long a file that rank 0 sees may take to appear on other hosts."""
SLOW_SECONDS = 3600
"""How long ranks wait for each other in a save or load at least: disks are slower than collectives."""


class HasState(Protocol):
    """What the manager asks of optimizers, schedule and loader."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Identity:
    """Whose checkpoints these are."""

    run_id: str = "run"
    data: str = ""
    """Fingerprint of the data."""
    start_id: str = "start"
    """Of this start of the run; the same on every rank."""
    check_owner: Callable[[], None] = _nothing
    """Called on rank 0 before a checkpoint appears; raises RunError where another process has taken the run over."""
    strict: bool = True
    """Refuse checkpoints that bear another run's id."""


class CheckpointManager:
    """Checkpoints of one run, in one folder. Every method is called by all ranks together.

    Args:
        folder: holds ``step-<step>`` folders; made when needed.
        config: ``[checkpoint]`` says how many to keep and whether to write in the background.
        parts: the model parts of this rank.
        optimizers: their optimizers; flat state by parameter name, tensors only.
        schedule: learning-rate schedule, the same on every rank; its state fits JSON.
        loader: its state is the same on every rank and fits JSON.
        balance: of the routers; its state is the same on every rank.
        identity: of the run; None loads checkpoints whosever they are.
        warn: takes what has to be told and does not end the run; called on rank 0.
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
        identity: Identity | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this process has written or loaded."""
        self._options = config.checkpoint
        self._parts = parts
        self._optimizers = optimizers
        self._schedule = schedule
        self._loader = loader
        self._balance = balance
        self._identity = identity or Identity(strict=False)
        self._warn = warn
        self._warned: set[str] = set()
        self._plans = PlanKeeper()
        self._writing: tuple[int, Any] | None = None
        self._tidying: threading.Thread | None = None
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        # A group of its own: a write in the background must not mix with the step's collectives.
        self._group = None
        if dist.is_initialized():
            seconds = max(config.comm.timeout_seconds, SLOW_SECONDS)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def replace(self, parts: list[nn.Module], optimizers: HasState, schedule: HasState, balance: HasState) -> None:
        """Go on with other parts of the same model, once the last ``save`` is on disk."""
        self.wait()
        self._plans.drop()
        self._parts, self._optimizers, self._schedule, self._balance = parts, optimizers, schedule, balance

    def save(self, step: int, beside: Mapping[str, str] | None = None) -> None:
        """Write the state after ``step`` steps; older checkpoints beyond ``keep_last`` go once it is whole.

        A write that fails (disk full, folder gone) is told and leaves the checkpoints before it as they are; the next
        save tries again. In the background (``async_save``) the state is copied before this returns, and the write's
        end is taken note of by the next ``save`` or ``wait``.

        Args:
            beside: name and text of small files that the checkpoint carries; rank 0's count.

        Raises:
            RunError: another process has taken the run over.
        """
        self.wait()
        identity = self._identity
        values = {"schedule": self._schedule.state_dict(), "loader": self._loader.state_dict()}
        manifest = Manifest(identity.run_id, identity.data, step, values)
        partial = partial_folder(self.folder, step, identity.run_id, identity.start_id)
        writer = Writer(self.folder, partial, manifest, identity.check_owner, beside=beside)
        state = {**self._tensors(), "rng": {_rng_key(): _rng()}}
        if self._options.async_save:
            self._finish(step, lambda: self._start_writing(step, state, writer), written=False)
        else:
            self._finish(step, lambda: dcp.save(state, **self._how(writer)), written=True)

    def wait(self) -> None:
        """Return once the last ``save`` is on disk, or has failed, and older ones are gone."""
        if self._writing is not None:
            step, future = self._writing
            self._writing = None
            self._finish(step, future.result, written=True)
        if self._tidying is not None:
            self._tidying.join()
            self._tidying = None

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None; the same on every rank."""
        steps = on_rank_0(lambda: whole_steps(self.folder), self._group)
        return steps[-1] if steps else None

    def load_latest(self) -> int | None:
        """Restore the newest checkpoint into the parts given at construction.

        Returns:
            Steps that the restored run has taken; None, and nothing changed, if there is no checkpoint.
        """
        step = self.latest()
        if step is not None:
            self.load(step)
        return step

    def load(self, step: int) -> None:
        """Restore the checkpoint of ``step``, whatever mesh wrote it.

        Raises:
            ConfigError: it is damaged or another run's; the same on every rank.
        """
        manifest = self._check(step)
        reader = Reader(step_folder(self.folder, step))
        saved, values, problem = _read_index(reader, manifest)
        if problem := next((found for found in self._gather(problem) if found), ""):
            raise self._refusal(step, problem)
        state = {**self._tensors(), "rng": {_rng_key(): _rng()}}
        # The generators belong to ranks: those of another number of ranks mean nothing here.
        if any(f"rng.{_rng_key()}.{device}" not in saved for device in state["rng"][_rng_key()]):
            del state["rng"]
        # Written by another optimizer.rounding: it has no low bits of weights.
        absent = {k for k in state["optimizer"] if k.endswith(".remainder") and f"optimizer.{k}" not in saved}
        state["optimizer"] = {k: v for k, v in state["optimizer"].items() if k not in absent}
        try:
            dcp.load(state, storage_reader=reader, planner=TensorsPlanner(), process_group=self._group)
        except CheckpointException as error:
            raise self._refusal(step, _cause(error)) from None
        self.saved_step = step
        for part in self._parts:
            # Not strict: each part takes its own keys from those of all parts.
            set_model_state_dict(part, dict(state["model"]), options=StateDictOptions(strict=False))
        self._optimizers.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(values["schedule"])
        self._loader.load_state_dict(values["loader"])
        self._balance.load_state_dict(state["balance"])
        if "rng" in state:
            _set_rng(state["rng"][_rng_key()])

    def _check(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint whose files are what was written, as each rank sees a share of them."""
        place = step_folder(self.folder, step)
        problem = on_rank_0(lambda: damage(place, contents=False), self._group)
        if not problem:
            end = time.monotonic() + LATE_SECONDS
            while (problem := damage(place, contents=False)) and time.monotonic() < end:
                time.sleep(0.2)
            problem = problem or damage(place, self._options.verify, (self._rank, self._ranks))
            problem = next((found for found in self._gather(problem) if found), "")
        if problem:
            raise self._refusal(step, problem)
        manifest = read_manifest(place)
        if manifest and manifest.step != step:
            raise self._refusal(step, f"it was saved after step {manifest.step}")
        if manifest and self._identity.strict and manifest.run_id != self._identity.run_id:
            raise ConfigError(
                f"checkpoint {str(place)!r} was saved by another run ({manifest.run_id}, this one is "
                f"{self._identity.run_id}).",
                "Set checkpoint.folder to a folder of this run alone, or move that checkpoint away.",
                common=True,
            )
        return manifest

    def _refusal(self, step: int, problem: str) -> ConfigError:
        place = step_folder(self.folder, step)
        before = [s for s in whole_steps(self.folder) if s < step and not damage(step_folder(self.folder, s), False)]
        remedy = (
            f"The one before it, of step {before[-1]}, is whole: to go on from there, move {str(place)!r} away."
            if before
            else "There is none before it: start over with --run.fresh true, or put a copy of it back."
        )
        return ConfigError(f"checkpoint {str(place)!r} is damaged: {problem}.", remedy, common=True)

    def _start_writing(self, step: int, state: dict[str, Any], writer: Writer) -> None:
        self._writing = (step, dcp.async_save(state, **self._how(writer)))

    def _how(self, writer: Writer) -> dict[str, Any]:
        return {"storage_writer": writer, "planner": self._plans.planner(), "process_group": self._group}

    def _finish(self, step: int, work: Callable[[], Any], written: bool) -> None:
        """Do a part of a save; what fails in it is told, and leaves no half-written folder."""
        try:
            work()
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if isinstance(cause, RunError):
                    raise cause from None
                if not isinstance(cause, Exception):
                    raise
            newest = f"; the newest is that of step {self.saved_step}" if self.saved_step is not None else ""
            self._tell(
                f"warning: the checkpoint of step {step} was not written: {_cause(error)}{newest}. "
                "The next save tries again."
            )
            self._plans.drop()
            self._start_tidying(keep=None)
            return
        if written:
            self.saved_step = step
            self._start_tidying(keep=self._options.keep_last)

    def _start_tidying(self, keep: int | None) -> None:
        """Delete what is not needed any more, on rank 0 and beside the training: no rank waits for it."""
        if self._rank == 0:
            self._tidying = threading.Thread(target=self._tidy, args=(keep,), daemon=True)
            self._tidying.start()

    def _tidy(self, keep: int | None) -> None:
        identity = self._identity
        try:
            problems = remove_partial(self.folder, identity.run_id)
            if keep:
                for step in whole_steps(self.folder)[:-keep]:
                    if self._is_own(step):
                        problems += remove_step(self.folder, step, identity.run_id, identity.start_id)
        except OSError as error:
            problems = [f"{error.filename}: {error.strerror}"]
        for problem in problems:
            if problem not in self._warned:
                self._warned.add(problem)
                self._warn(f"warning: an old checkpoint could not be deleted: {problem}.")

    def _is_own(self, step: int) -> bool:
        try:
            manifest = read_manifest(step_folder(self.folder, step))
        except ValueError:
            return False
        return manifest is None or manifest.run_id == self._identity.run_id

    def _tell(self, text: str) -> None:
        if self._rank == 0:
            self._warn(text)

    def _gather(self, value: str) -> list[str]:
        if self._ranks == 1:
            return [value]
        values = [""] * self._ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _tensors(self) -> dict[str, Any]:
        """Model, optimizer and balance; the tensors are the live ones."""
        model = {name: value for part in self._parts for name, value in get_model_state_dict(part).items()}
        return {"model": model, "optimizer": self._optimizers.state_dict(), "balance": self._balance.state_dict()}


def _read_index(reader: Reader, manifest: Manifest | None) -> tuple[set[str], dict[str, Any], str]:
    """Names in the index, what is no tensor, and what is wrong; an older version kept the former beside the tensors."""
    try:
        metadata = reader.read_metadata()
        values = (
            manifest.values
            if manifest
            else {
                "schedule": {"steps": reader.read_bytes(metadata, "schedule.steps")},
                "loader": json.loads(reader.read_bytes(metadata, "loader")),
            }
        )
    except (pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        return set(), {}, f"its index cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
    return set(metadata.state_dict_metadata), values, ""


def _cause(error: CheckpointException) -> str:
    """The first rank's failure, in a line."""
    rank, (cause, _) = min(error.failures.items())
    text = f"{cause.strerror}: {cause.filename}" if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"rank {rank}: {text}".splitlines()[0].replace(": None", "")


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
