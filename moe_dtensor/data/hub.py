"""The ``datasets`` corpus: local files of records, or a name on the Hugging Face hub, read as training goes.

Which commit of a name on the hub a run reads is found once, when the run begins, and kept.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.config.schema import Config, Data, Source
from moe_dtensor.data.files import DataFiles, Owners, check_apart, find_files, own_folders
from moe_dtensor.data.records import BadRecords, Record, find_text
from moe_dtensor.data.text import FileDocuments, is_held_out
from moe_dtensor.data.tokenizer import Tokenizer

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of a download."""
REFUSED = {"5.0.0": "a stream that is resumed twice starts over"}
"""Releases of the datasets library that would give wrong batches."""


class DatasetsCorpus:
    """Records of a dataset, streamed in its own order; the text is in ``data.text_key``.

    ``data.path`` is a folder or file, or a hub name ``name[:config]``; ``@split`` at its end overrides
    ``data.split``. Without ``data.validation_path`` about one record in 20, by hash of its text, is held out.

    Raises:
        ConfigError: the package is missing or a bad release, or there is no such dataset, split or text field.
    """

    streaming = True

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.data, self.own = config.data, own_folders(config)
        self.files: DataFiles | None = None
        self.validation_files: DataFiles | None = None
        if is_local(self.data.path):
            self.files = find_split("data.path", self.data.path, self.data.split, self.own)
        if self.data.validation_path and is_local(self.data.validation_path):
            self.validation_files = find_split(
                "data.validation_path", self.data.validation_path, self.data.split, self.own
            )
        if self.data.validation_path:
            if self.files and self.validation_files:
                check_apart(self.files.taken, self.validation_files.taken)
            names = [divide_split(path, self.data.split) for path in (self.data.path, self.data.validation_path)]
            if not self.files and names[0] == names[1]:
                raise ConfigError(
                    f"data.validation_path = {self.data.validation_path!r} is what data.path trains on.",
                    "Name another split, as name@validation, or leave it empty: then a part is held out.",
                )

    def documents(self, split: str) -> Iterator[str]:
        """Texts of a split, in an iterator with a state."""
        data = self.data
        apart = bool(data.validation_path)
        key = "data.validation_path" if apart and split == "validation" else "data.path"
        path, files = (
            (data.validation_path, self.validation_files) if key == "data.validation_path" else (data.path, self.files)
        )
        picked = None if apart else split
        if files is not None:
            return FileDocuments(files, data.text_key, picked, data.max_bad_records)
        # A validation set of another name has revisions of its own.
        same = repository(path) == repository(data.path)
        dataset = open_dataset(key, path, data.split, data.revision if same else "")
        return StreamedDocuments(dataset, path, data.text_key, picked, data.max_bad_records)

    def fingerprint(self) -> str:
        """Name, split and text field, and a local folder's file names and sizes."""
        name, split = divide_split(self.data.path, self.data.split)
        local = Path(os.path.expanduser(name))
        if not local.exists():
            at = f"{split}@{self.data.revision}" if self.data.revision else split
            return f"datasets {name} {at} {self.data.text_key} {self.tokenizer.fingerprint()}"
        root, owners = local if local.is_dir() else local.parent, Owners(self.own)
        files = [f for f in ([local] if local.is_file() else sorted(local.rglob("*"))) if f.is_file()]
        sizes = [(f.relative_to(root).as_posix(), f.stat().st_size) for f in files if not owners.find(str(f))]
        return f"datasets {sizes} {split} {self.data.text_key} {self.tokenizer.fingerprint()}"


class StreamedDocuments:
    """Iterator over the texts of a streaming dataset, resumable.

    Args:
        dataset: a ``datasets.IterableDataset``.
        place: named in errors.
        text_key: field of the text.
        split: ``train`` or ``validation`` to pick by hash; None takes all.
        max_bad: share of records that may be skipped.
    """

    def __init__(self, dataset: Any, place: str, text_key: str, split: str | None, max_bad: float = 0.0) -> None:
        self.dataset, self.place, self.text_key, self.split = dataset, place, text_key, split
        self.bad = BadRecords(max_bad)
        self._records: Iterator[Any] | None = None
        self._loaded: Any = None

    def __iter__(self) -> StreamedDocuments:
        return self

    def __next__(self) -> str:
        while True:
            try:
                record = self._next_record()
            except StopIteration:
                self.bad.judge()
                raise
            text, why = find_text(record, self.text_key)
            text = self.bad.take(Record(text, self.bad.read + 1, why), self.place)
            if text is not None and (self.split is None or is_held_out(text) == (self.split == "validation")):
                return text

    def _next_record(self) -> Any:
        """The next record; after a failed download again from the same place, with growing pauses between tries."""
        for pause in (*PAUSES, None):
            try:
                if self._records is None:
                    self._records = iter(self.dataset)
                return next(self._records)
            except StopIteration:
                raise
            except Exception as error:  # of the network, by whatever library is below
                if pause is None:
                    raise RunError(
                        f"{self.place!r} could not be read on after {len(PAUSES)} more tries "
                        f"({type(error).__name__}: {error}).",
                        "Start again when it can be reached: the run resumes from its last checkpoint.",
                    ) from error
                logging.getLogger(__name__).warning("reading %r failed (%s); again in %g s", self.place, error, pause)
                time.sleep(pause)
                if self._records is not None:
                    self._loaded, self._records = self.dataset.state_dict(), None
                if self._loaded is not None:
                    self.dataset.load_state_dict(self._loaded)
        raise AssertionError

    def state_dict(self) -> Any:
        """The dataset's position (shard, row); None before the first record."""
        return self._loaded if self._records is None else self.dataset.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Continue there. Call before the first record is read."""
        self._loaded = state
        if state is not None:
            self.dataset.load_state_dict(state)


def divide_split(path: str, split: str) -> tuple[str, str]:
    """``name@split`` as a pair, ``split`` where the path names none. A path that exists is taken whole."""
    name, at, named = path.rpartition("@")
    return (name, named) if at and not os.path.exists(os.path.expanduser(path)) else (path, split)


def is_local(path: str) -> bool:
    """Whether a path, without its split, is a folder or a file."""
    return os.path.exists(os.path.expanduser(divide_split(path, "")[0]))


def find_split(key: str, path: str, split: str, own: tuple[str, ...]) -> DataFiles:
    """The files of a local folder that belong to a split by their names, in the datasets library's order."""
    name, split = divide_split(path, split)
    files = find_files(key, name, own)
    local = os.path.abspath(os.path.expanduser(name))
    if os.path.isfile(local):
        return files
    datasets = load_library()
    try:
        patterns = datasets.data_files.get_data_patterns(local)
        splits = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=local)
    except Exception as error:  # no file that it knows: then all are of one split
        if not isinstance(error, FileNotFoundError):
            raise
        splits = {}
    if "train" not in splits:
        named = {os.path.abspath(f) for found in splits.values() for f in found}
        splits = {"train": [f for f in files.taken if f not in named], **splits}
    if not splits.get(split):
        raise ConfigError(
            f"{key} = {path!r} must have the split {split!r}; by the names of its files it has "
            f"{', '.join(str(s) for s in splits if splits[s])}.",
            "Set data.split to one of them.",
        )
    known = [os.path.abspath(f) for f in splits[split]]
    taken = tuple(f for f in known if f in set(files.taken))
    others = {f: f"of another split than {split!r}" for f in files.taken if f not in set(known)}
    return DataFiles(taken, files.formats, files.left_out | others)


def load_library() -> Any:
    """The datasets package; ConfigError where it is missing or a release that gives wrong batches."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.corpus = 'datasets' needs the package datasets, which cannot be imported ({error}).",
            "Install it (pip install datasets), or set data.corpus = 'files'.",
        ) from error
    version = importlib.metadata.version("datasets")
    if version in REFUSED:
        raise ConfigError(
            f"the package datasets {version} cannot be used: {REFUSED[version]}.",
            "Install another release: pip install -U datasets.",
        )
    datasets.disable_progress_bars()
    return datasets


def repository(path: str) -> str:
    """The hub's name for what ``name[:config][@split]`` names."""
    return divide_split(path, "")[0].partition(":")[0]


def check_name(key: str, path: str) -> None:
    """ConfigError where ``path`` cannot be a hub name."""
    name = divide_split(path, "")[0]
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{key} must be a folder, a file, or a hub name of the form name[:config]; {path!r} does not exist "
            f"(from {os.getcwd()!r}).",
            f"Set {key} to a folder of .jsonl, .parquet or .txt files.",
        )


def open_dataset(key: str, path: str, split: str, revision: str = "") -> Any:
    """The streaming dataset on the hub that ``key = path`` names, as it was at a revision."""
    datasets = load_library()
    check_name(key, path)
    name, split = divide_split(path, split)
    hub_name, _, hub_config = name.partition(":")
    at = revision or None
    try:
        return datasets.load_dataset(path=hub_name, name=hub_config or None, split=split, streaming=True, revision=at)
    except Exception as error:  # offline, no such name, config, split, or broken files: the cause is in the message
        raise ConfigError(
            f"{key} = {path!r} (split {split!r}) must be a dataset that the datasets package can load; "
            f"{type(error).__name__}: {error}",
            f"Check {key} and data.split, and the network for a hub name.",
        ) from error


def pin_revisions(config: Config, kept: Mapping[str, str] | None) -> Config:
    """Fill in the commit of every hub name of ``[data]`` and its sources, so that a run reads the same for ever.

    Args:
        config: of the run.
        kept: by path, the revisions of the run that goes on; they stand where the config names none.

    Raises:
        ConfigError: the hub cannot be asked, or has no such name or revision.
    """

    def pinned(key: str, part: Data | Source) -> str:
        if part.corpus != "datasets" or is_local(part.path):
            return part.revision
        if not part.revision and kept is not None and part.path in kept:
            return kept[part.path]
        return find_commit(f"{key}.path", part.path, part.revision)

    data = config.data
    if data.sources:
        sources = tuple(replace(s, revision=pinned(f"data.sources.{s.name}", s)) for s in data.sources)
        return replace(config, data=replace(data, sources=sources))
    return replace(config, data=replace(data, revision=pinned("data", data)))


def reads_hub(config: Config) -> bool:
    """Whether something of ``[data]`` is read from the hub."""
    return any(part.corpus == "datasets" and not is_local(part.path) for part in config.data.sources or (config.data,))


def find_commit(key: str, path: str, revision: str) -> str:
    """The commit that ``revision`` of a hub name is now; the newest if it is empty."""
    check_name(key, path)
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository(path), revision=revision or None).sha or ""
    except Exception as error:  # offline, no such name or revision: the cause is in the message
        of = f" (revision {revision!r})" if revision else ""
        raise ConfigError(
            f"{key} = {path!r}{of} must be a dataset on the hub; "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            f"Check {key}, its revision, and the network.",
        ) from error
