"""DCP's own files, written under a hidden name with checksums, and read without trust in their pickles."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_dtensor.checkpoint.folder import (
    INDEX,
    Manifest,
    partial_folder,
    step_folder,
    sync_folder,
    write_small,
)

_FILES = "files of a rank"
_ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "StorageMeta",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch": {"Size"} | {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)},
}


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a DCP folder; admits nothing but what DCP itself writes into one."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, or an UnpicklingError."""
        if name in _ADMITTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint has")


class _CountingStream(io.RawIOBase):
    """A file that is written from start to end, with its size and CRC-32 so far."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size, self.crc = 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.size += len(view)
        self.crc = zlib.crc32(view, self.crc)
        return len(view)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self._file.flush()
        return self._file.fileno()


class _CountingFiles(FileSystem):
    """Files as DCP wants them, with size and CRC-32 of each that was written."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        if "w" not in mode:
            with Path(path).open(mode) as file:
                yield cast(io.IOBase, file)
            return
        with Path(path).open(mode) as file:
            stream = _CountingStream(file)
            yield stream
            self.written[Path(path).name] = (stream.size, stream.crc)


class Writer(FileSystemWriter):
    """Writes a checkpoint under ``partial`` and gives it its name when all ranks have written.

    Args:
        folder: holds the checkpoints; seen by every rank (a shared file system when there are several hosts).
        partial: folder to write in.
        manifest: without files.
        before_rename: called on rank 0 before the checkpoint appears; raises where it must not.
        beside: name and text of small files that the checkpoint carries, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        partial: Path,
        manifest: Manifest,
        before_rename: Callable[[], None],
        file_per_tensor: bool = False,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(partial, single_file_per_rank=not file_per_tensor, overwrite=False)
        self.fs = _CountingFiles()
        self._folder, self._manifest, self._before_rename = folder, manifest, before_rename
        self._beside = dict(beside or {})

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file; its checksum travels to rank 0 with the results."""
        self.fs = files = _CountingFiles()
        results = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, WriteResult(MetadataIndex(_FILES), 0, files.written)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0, in the writing thread, after the last rank has written."""
        own = [[result for result in rank if result.index.fqn != _FILES] for rank in results]
        files = {k: v for rank in results for r in rank if r.index.fqn == _FILES for k, v in r.storage_data.items()}
        files[INDEX] = self.write_index(metadata, own)
        partial, manifest = Path(self.path), self._manifest
        for name, text in self._beside.items():
            write_small(partial / name, text)
            files[name] = len(text.encode()), zlib.crc32(text.encode())
        Manifest(manifest.run_id, manifest.data, manifest.step, manifest.values, files).write(partial)
        self._before_rename()
        place = step_folder(self._folder, manifest.step)
        if place.exists():  # a step taken again after a resume from an older checkpoint
            os.replace(place, partial.with_suffix(".deleted"))
        os.replace(partial, place)
        sync_folder(self._folder)

    def write_index(self, metadata: Metadata, results: list[list[WriteResult]]) -> tuple[int, int]:
        """Write where every part lies; size and CRC-32 of the file."""
        # Each rank sends names and offsets of its own. As the same objects they are in the index once.
        same: dict[Any, Any] = {name: name for name in metadata.state_dict_metadata}
        for result in (result for rank in results for result in rank):
            index, place = result.index, result.storage_data
            index.__dict__["fqn"] = same.setdefault(index.fqn, index.fqn)
            index.__dict__["offset"] = same.setdefault(index.offset, index.offset)
            place.relative_path = same.setdefault(place.relative_path, place.relative_path)
        self.fs = counting = _CountingFiles()
        super().finish(metadata, results)
        return counting.written[f"{INDEX}.tmp"]


def write_alone(folder: Path, manifest: Manifest, file_per_tensor: bool = False) -> Writer:
    """A writer for a process that is the only one to write into ``folder``.

    Args:
        folder: holds the checkpoint's folder.
        manifest: without files.
        file_per_tensor: write each tensor to a file of its own. DCP holds what goes into one file until it is written.
    """
    partial = partial_folder(folder, manifest.step, manifest.run_id, "alone")
    return Writer(folder, partial, manifest, lambda: None, file_per_tensor)


class Reader(FileSystemReader):
    """Reads DCP's files; the index by :class:`IndexUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UnpicklingError: it is damaged, or holds what no index has.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata = IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_bytes(self, metadata: Metadata, name: str) -> Any:
        """What an older version saved under ``name``: a number or a text, read by a weights-only unpickler."""
        self.set_up_storage_reader(metadata, True)
        index = MetadataIndex(name)
        item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([]), index, torch.Size([]), torch.Size([]))
        planner = _BytesPlanner()
        self.read_data(LoadPlan([item]), planner).wait()
        return planner.value


class _BytesPlanner(DefaultLoadPlanner):
    value: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, weights_only=True)


class TensorsPlanner(DefaultLoadPlanner):
    """Loads tensors, and refuses pickled values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called for a state of tensors."""
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")
