"""Which checkpoints a folder holds, and how one becomes whole or goes away. Rank 0's work.

A checkpoint is the folder ``step-<step>``. It is written and deleted under a hidden name, so a folder of
that name is always whole: renaming is the one act that makes it appear or vanish.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

_WHOLE = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"\.step-(\d+)\.(partial|deleted)")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies once it is whole."""
    return folder / f"step-{step:08d}"


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, ascending; half-written ones are not among them."""
    if not folder.is_dir():
        return []
    matches = [_WHOLE.fullmatch(entry.name) for entry in folder.iterdir() if (entry / ".metadata").is_file()]
    return sorted(int(match[1]) for match in matches if match)


def remove_partial(folder: Path) -> None:
    """Delete what interrupted writes and deletions left behind. No write may be under way."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if _PARTIAL.fullmatch(entry.name):
                shutil.rmtree(entry)


def remove_step(folder: Path, step: int) -> None:
    """Delete a whole checkpoint; interrupted half-way, it no longer counts as one."""
    deleted = folder / f".step-{step:08d}.deleted"
    os.replace(step_folder(folder, step), deleted)
    shutil.rmtree(deleted)


def remove_all(folder: Path) -> None:
    """Delete every checkpoint, and the folder if nothing else is in it."""
    remove_partial(folder)
    for step in whole_steps(folder):
        remove_step(folder, step)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class AtomicWriter(FileSystemWriter):
    """Writes the checkpoint of one step beside its place and renames it when all ranks have written.

    Args:
        folder: holds the checkpoints; seen by every rank (a shared file system when there are several hosts).
        step: the step's number.
        keep_last: whole checkpoints to keep, this one included; 0 keeps all.
        file_per_tensor: write each tensor to a file of its own. DCP holds what goes into one file until it is written.
    """

    def __init__(self, folder: Path, step: int, keep_last: int, file_per_tensor: bool = False) -> None:
        super().__init__(folder / f".step-{step:08d}.partial", single_file_per_rank=not file_per_tensor)
        self._folder = folder
        self._step = step
        self._keep_last = keep_last

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0, in the writing thread, after the last rank has written."""
        super().finish(metadata, results)
        if step_folder(self._folder, self._step).exists():
            remove_step(self._folder, self._step)
        os.replace(self.path, step_folder(self._folder, self._step))
        _sync(self._folder)
        if self._keep_last:
            for step in whole_steps(self._folder)[: -self._keep_last]:
                remove_step(self._folder, step)


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
