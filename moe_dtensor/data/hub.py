"""The ``datasets`` corpus: a local folder or file, or a name on the Hugging Face hub, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.text import get_text, is_held_out
from moe_dtensor.data.tokenizer import Tokenizer

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}


class DatasetsCorpus:
    """Records of a dataset, streamed in its own order; the text is in ``data.text_key``.

    ``data.path`` is a folder or file (.jsonl, .parquet, .txt, .csv), or a hub name ``name[:config]``; ``@split`` at its
    end overrides ``data.split``. Without ``data.validation_path`` about one record in 20, by hash of its text, is held
    out.

    Raises:
        ConfigError: the package is missing, or there is no such dataset, split or text field.
    """

    streaming = True

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.data = config.data

    def documents(self, split: str) -> StreamedDocuments:
        """Texts of a split, in an iterator with a state."""
        data = self.data
        apart = bool(data.validation_path)
        key = "data.validation_path" if apart and split == "validation" else "data.path"
        path = data.validation_path if key == "data.validation_path" else data.path
        return StreamedDocuments(open_dataset(key, path, data.split), path, data.text_key, None if apart else split)

    def fingerprint(self) -> str:
        """Name, split and text field, and a local folder's file names and sizes."""
        name, split = divide_split(self.data.path, self.data.split)
        local = Path(name).expanduser()
        if not local.exists():
            return f"datasets {name} {split} {self.data.text_key} {self.tokenizer.fingerprint()}"
        root = local if local.is_dir() else local.parent
        files = [f for f in ([local] if local.is_file() else sorted(local.rglob("*"))) if f.is_file()]
        sizes = [(f.relative_to(root).as_posix(), f.stat().st_size) for f in files]
        return f"datasets {sizes} {split} {self.data.text_key} {self.tokenizer.fingerprint()}"


class StreamedDocuments:
    """Iterator over the texts of a streaming dataset, resumable.

    Args:
        dataset: a ``datasets.IterableDataset``.
        place: named in errors.
        text_key: field of the text.
        split: ``train`` or ``validation`` to pick by hash; None takes all.
    """

    def __init__(self, dataset: Any, place: str, text_key: str, split: str | None) -> None:
        self.dataset, self.place, self.text_key, self.split = dataset, place, text_key, split
        self._records: Iterator[Any] | None = None
        self._loaded: Any = None

    def __iter__(self) -> StreamedDocuments:
        return self

    def __next__(self) -> str:
        if self._records is None:
            self._records = iter(self.dataset)
        while True:
            text = get_text(next(self._records), self.text_key, f"a record of {self.place!r}")
            if self.split is None or is_held_out(text) == (self.split == "validation"):
                return text

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


def open_dataset(key: str, path: str, split: str) -> Any:
    """The streaming dataset that ``key = path`` names."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.corpus = 'datasets' needs the package datasets, which cannot be imported ({error}).",
            "Install it (pip install datasets), or set data.corpus = 'files'.",
        ) from error
    datasets.disable_progress_bars()
    name, split = divide_split(path, split)
    local = Path(name).expanduser()
    kwargs: dict[str, Any] = {"split": split, "streaming": True}
    if local.is_file():
        if local.suffix not in BUILDERS:
            raise ConfigError(
                f"{key} must end in one of {', '.join(BUILDERS)}, or be a folder of them; it is {path!r}.",
                "Convert the file, or set data.corpus = 'files' for plain text.",
            )
        kwargs |= {"path": BUILDERS[local.suffix], "data_files": str(local)}
    elif local.is_dir():
        kwargs |= {"path": str(local)}
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{key} must be a folder, a file, or a hub name of the form name[:config]; {path!r} does not exist "
            f"(from {os.getcwd()!r}).",
            f"Set {key} to a folder of .jsonl, .parquet or .txt files.",
        )
    else:
        hub_name, _, hub_config = name.partition(":")
        kwargs |= {"path": hub_name, "name": hub_config or None}
    if holds_text_files(local):
        kwargs["sample_by"] = "document"  # else every line is a record
    try:
        return datasets.load_dataset(**kwargs)
    except Exception as error:  # offline, no such name, config, split, or broken files: the cause is in the message
        raise ConfigError(
            f"{key} = {path!r} (split {split!r}) must be a dataset that the datasets package can load; "
            f"{type(error).__name__}: {error}",
            f"Check {key} and data.split, and the network for a hub name.",
        ) from error


def holds_text_files(local: Path) -> bool:
    """Whether a local dataset is plain text: its first file by name ends in ``.txt``."""
    if local.is_dir():
        files = sorted(f for f in local.rglob("*") if f.suffix in BUILDERS)
        return bool(files) and files[0].suffix == ".txt"
    return local.is_file() and local.suffix == ".txt"
