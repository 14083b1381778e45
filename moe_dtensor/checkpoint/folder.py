"""Which checkpoints a folder holds, whose they are, and how one goes away. Rank 0's work, done for all ranks by
:func:`on_rank_0`: file systems may show other ranks an older view of a folder.

A checkpoint is the folder ``step-<step>``. It is written and deleted under a hidden name, so that renaming is the one
act that makes it appear or vanish; small files are whole and on disk, or not there. Its manifest names the run, the
step, what is no tensor, and every file's size and checksum.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def on_rank_0(work: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Result of ``work()`` of rank 0, on every rank; what it raises is raised on every rank.

    Args:
        work: called on rank 0 only; result and exception travel by pickle.
        group: of all ranks; the default group if None. Without process groups ``work`` is just called.
    """
    # Here, since what looks at folders alone loads no torch.
    import torch.distributed as dist

    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # raised below, here and on the ranks that wait for it
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def write_small(path: Path, text: str) -> None:
    """Replace the file as a whole, so that no reader, no crash and no power failure leaves half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MANIFEST = "manifest.json"
INDEX = ".metadata"
_WHOLE = re.compile(r"step-(\d+)")
_HIDDEN = re.compile(r"\.step-(\d+)\.(?:(?P<run>\w+)\.(?P<start>\w+)\.)?(partial|deleted)")
_PIECE = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """``manifest.json`` of a checkpoint."""

    run_id: str
    """Of the run that wrote it."""
    data: str
    """Fingerprint of the data it was trained on."""
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    """State that is no tensor: of the schedule and the loader."""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size in bytes and CRC-32 of every other file."""
    format: int = 1

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        write_small(folder / MANIFEST, json.dumps(asdict(self)))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where an older version wrote the checkpoint, without one.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    try:
        content["files"] = {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
        return Manifest(**{key: value for key, value in content.items() if key in Manifest.__dataclass_fields__})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not complete ({error})") from None


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies once it is whole."""
    return folder / f"step-{step:08d}"


def partial_folder(folder: Path, step: int, run_id: str, start_id: str) -> Path:
    """Where a start of a run writes the checkpoint of ``step``."""
    return folder / f".step-{step:08d}.{run_id}.{start_id}.partial"


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, ascending; half-written ones are not among them."""
    if not folder.is_dir():
        return []
    matches = [_WHOLE.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def owners(folder: Path) -> dict[int, str | None]:
    """The run that wrote each checkpoint; None where that is not written in it (an older version, or damage)."""
    found: dict[int, str | None] = {}
    for step in whole_steps(folder):
        try:
            manifest = read_manifest(step_folder(folder, step))
        except (ValueError, OSError):
            manifest = None
        found[step] = manifest.run_id if manifest else None
    return found


def damage(folder: Path, contents: bool, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint's files; empty if nothing.

    Args:
        folder: of the checkpoint.
        contents: compare checksums, too, which reads every byte; else sizes alone.
        share: (i, n) checks the contents of every n-th file from the i-th.
    """
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if manifest is None:
        index = folder / INDEX
        if not index.is_file() or index.stat().st_size == 0:
            return f"its index {INDEX} is {'empty' if index.is_file() else 'missing'}"
        return ""
    for name, (size, _) in sorted(manifest.files.items()):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes of {size}"
    if contents:
        for name in sorted(manifest.files)[share[0] :: share[1]]:
            if checksum(folder / name) != manifest.files[name][1]:
                return f"the contents of {name} are not what was written (CRC-32)"
    return ""


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def remove_partial(folder: Path, run_id: str, keep_start: str = "") -> list[str]:
    """Delete what interrupted writes and deletions of a run left behind, but for those of ``keep_start``.

    Returns:
        What could not be deleted, and why.
    """
    problems: list[str] = []
    if folder.is_dir():
        for entry in list(folder.iterdir()):
            match = _HIDDEN.fullmatch(entry.name)
            if match and match["run"] == run_id and match["start"] != keep_start:
                problems += _remove_tree(entry)
    return problems


def remove_step(folder: Path, step: int, run_id: str, start_id: str) -> list[str]:
    """Delete a whole checkpoint; interrupted half-way, it no longer counts as one. Returns what could not be done."""
    deleted = folder / f".step-{step:08d}.{run_id}.{start_id}.deleted"
    try:
        os.replace(step_folder(folder, step), deleted)
    except OSError as error:
        return [f"{step_folder(folder, step)}: {error.strerror}"]
    return _remove_tree(deleted)


def remove_all(folder: Path, run_id: str) -> None:
    """Delete every checkpoint of a run, and the folder if nothing else is in it; a link to a folder stays.

    Raises:
        OSError: something could not be deleted.
    """
    for step, owner in owners(folder).items():
        if owner in (run_id, None):
            shutil.rmtree(step_folder(folder, step))
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        match = _HIDDEN.fullmatch(entry.name)
        if match and match["run"] in (run_id, None):
            shutil.rmtree(entry)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_tree(folder: Path) -> list[str]:
    """Delete a folder as far as it can be; returns what could not be."""
    problems: list[str] = []

    def note(_: object, path: str, error: Any) -> None:
        problems.append(f"{path}: {getattr(error[1], 'strerror', error[1])}")

    shutil.rmtree(folder, onerror=note)
    return problems[:1]
