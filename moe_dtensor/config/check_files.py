"""What of a config's files and folders can be checked before anything starts. Loads no torch.

Apart from :mod:`moe_dtensor.config.check`, since a config may be planned for a machine that has other files.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config

_TEXT = (".txt", ".jsonl")


def check_files(config: Config) -> None:
    """Raise for the first file or folder that the config names and that cannot serve.

    Raises:
        ConfigError: a path that does not exist or cannot be read, a tokenizer that is none, or a corpus too small
            for a global batch whatever the tokenizer makes of it.
    """
    _check_tokenizer(config.data.tokenizer)
    for key in ("path", "validation_path"):
        path = getattr(config.data, key)
        if path and config.data.corpus in ("files", "tokens"):
            files = list(_named_files(config.data.corpus, f"data.{key}", path))
            for file in files:
                _check_readable(f"data.{key}", file)
            _check_size(config, f"data.{key}", files)
    for one in config.eval.sets:
        place = os.path.expanduser(one.path)
        if not os.path.exists(place) and not glob.glob(place, recursive=True):
            raise ConfigError(
                f"eval.sets.{one.name}.path = {one.path!r} matches no file (from {os.getcwd()!r}).",
                "Set it to a file, a folder or a glob of texts.",
            )
    _check_run_folder(config)


def _check_tokenizer(name: str) -> None:
    if name == "bytes":
        return
    file = Path(name).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer must be bytes, a tokenizer.json, or a folder that holds one; there is no file "
            f"{str(file)!r}.",
            "Set data.tokenizer = 'bytes', or to the file's path.",
        )
    _check_readable("data.tokenizer", str(file))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        content = error
    if not isinstance(content, dict) or "model" not in content:
        raise ConfigError(
            f"data.tokenizer = {name!r}: {str(file)!r} is not a Hugging Face tokenizer "
            f"({content if isinstance(content, ValueError) else 'it has no model'}).",
            "Give a tokenizer.json as written by the tokenizers library.",
        )


def _named_files(corpus: str, key: str, path: str) -> Iterator[str]:
    place = os.path.expanduser(path)
    if corpus == "tokens":
        if not os.path.isfile(place) or not place.endswith((".npy", ".bin")):
            raise ConfigError(
                f"{key} must be a .npy or .bin file of token ids for data.corpus = 'tokens'; {path!r} is not "
                f"(from {os.getcwd()!r}).",
                f"Set {key} to such a file; docs/data.md shows how to make one.",
            )
        yield place
        return
    if os.path.isdir(place):
        found = [f for e in _TEXT for f in glob.glob(f"{glob.escape(place)}/**/*{e}", recursive=True)]
    else:
        found = [place] if os.path.isfile(place) else glob.glob(place, recursive=True)
    files = [f for f in found if os.path.isfile(f)]
    if not files:
        raise ConfigError(
            f"{key} must be a text file, a folder of .txt or .jsonl files, or a glob; {path!r} matches no file "
            f"(from {os.getcwd()!r}).",
            f"Set {key} to files that exist, such as 'texts/*.txt' or 'texts/**/*.jsonl'.",
        )
    yield from files


def _check_readable(key: str, file: str) -> None:
    try:
        with open(file, "rb"):
            return
    except OSError as error:
        raise ConfigError(f"{key}: {file!r} cannot be read: {error.strerror}.", "Mend its permissions.") from None


def _check_size(config: Config, key: str, files: list[str]) -> None:
    """No tokenizer makes more tokens of a text than it has bytes, and an end token for each document."""
    size = sum(os.path.getsize(file) for file in files)
    if config.data.corpus == "tokens":
        most = size // (4 if files[0].endswith(".uint32.bin") else 2 if files[0].endswith(".bin") else 1)
    else:
        most = size + len(files)
    training = config.training
    wanted = training.global_batch_size * training.seq_len + 1
    if most < wanted:
        raise ConfigError(
            f"{key}: the split must fill one global batch: training.global_batch_size = {training.global_batch_size} "
            f"sequences of training.seq_len = {training.seq_len} tokens; {len(files)} file(s) of {size} bytes have at "
            f"most {most} tokens.",
            "Give more text, or lower training.global_batch_size or training.seq_len.",
        )


def _check_run_folder(config: Config) -> None:
    """The nearest folder that exists has to be one, and one may write there."""
    place = Path(config.run.folder)
    existing = next(folder for folder in (place, *place.parents) if folder.exists() or folder == folder.parent)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "may not be written" if existing.is_dir() else "is no folder"
        raise ConfigError(
            f"run.folder = {config.run.folder!r} cannot be used: {str(existing)!r} {why}.",
            "Set run.folder to a folder that can be written.",
        )
