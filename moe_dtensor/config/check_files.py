"""What of a config's files and folders can be checked before anything starts. Loads no torch.

Apart from :mod:`moe_dtensor.config.check`, since a config may be planned for a machine that has other files.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import netrc
import os
import sys
from pathlib import Path

from moe_dtensor.config.check_data import data_parts
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import names_object
from moe_dtensor.config.schema import Config


def check_files(config: Config) -> None:
    """Raise for the first file, folder, package or account that the config asks for and that cannot serve.

    Raises:
        ConfigError: a path that does not exist or cannot be read, a tokenizer that is none, a corpus too small for a
            global batch whatever the tokenizer makes of it, or a module of one's own or a package that is not there.
    """
    _check_tokenizer(config.data.tokenizer)
    template = os.path.expanduser(config.data.chat_template)
    if template and not os.path.isfile(template):
        raise ConfigError(f"data.chat_template: there is no file {template!r}.", "Name a file of Jinja.")
    for where, part in data_parts(config.data):
        for key in ("path", "validation_path"):
            path = getattr(part, key)
            if path and part.corpus in ("files", "conversations", "tokens"):
                files = _named_files(part.corpus, f"{where}.{key}", path)
                for file in files:
                    _check_readable(f"{where}.{key}", file)
                sized = part.corpus != "conversations"  # a template adds what the files do not have
                if sized and where == "data" and (key == "path" or config.training.validation_interval):
                    _check_size(config, f"{where}.{key}", files)
    for one in config.eval.sets:
        place = os.path.expanduser(one.path)
        if not os.path.exists(place) and not glob.glob(place, recursive=True):
            raise ConfigError(
                f"eval.sets.{one.name}.path = {one.path!r} matches no file (from {os.getcwd()!r}).",
                "Set it to a file, a folder or a glob of texts.",
            )
    _check_own_parts(config)
    _check_initial(config)
    _check_run_folder(config)
    _check_sinks(config)


def _check_tokenizer(name: str) -> None:
    if name == "bytes":
        return
    file = Path(os.path.expanduser(name))
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


def _named_files(corpus: str, key: str, path: str) -> list[str]:
    """What a path may mean, by names alone; the corpus itself looks at what they hold."""
    place = os.path.expanduser(path)
    if corpus == "tokens" and not os.path.exists(place):
        place = next((place + end for end in (".bin", ".idx") if os.path.isfile(place + end)), place)
    if os.path.isdir(place):
        files = [os.path.join(folder, name) for folder, _, names in os.walk(place, followlinks=True) for name in names]
        files = [file for file in files if "/." not in file[len(place) :]]
    else:
        files = [place] if os.path.isfile(place) else [f for f in glob.glob(place, recursive=True) if os.path.isfile(f)]
    if not files:
        kinds = "token files" if corpus == "tokens" else "files of text"
        raise ConfigError(
            f"{key} must be a file, a folder or a glob of {kinds}; {path!r} matches no file (from {os.getcwd()!r}).",
            f"Set {key} to files that exist; docs/data.md says what they may hold.",
        )
    return files


def size_of_files(config: Config) -> int | None:
    """Bytes of the files that the corpora read; None where there are none, or not all are known by name."""
    sizes = []
    for _, part in data_parts(config.data):
        for path in filter(None, (part.path, part.validation_path)):
            here = os.path.exists(os.path.expanduser(path))  # else a stream's path is a name on the hub
            if part.corpus not in ("files", "conversations", "tokens") and not (part.corpus == "datasets" and here):
                return None
            sizes += [os.path.getsize(file) for file in _named_files(part.corpus, "path", path)]
    return sum(sizes) if sizes else None


def _check_readable(key: str, file: str) -> None:
    if not os.access(file, os.R_OK):
        raise ConfigError(f"{key}: {file!r} may not be read.", "Mend its permissions.")


def _check_size(config: Config, key: str, files: list[str]) -> None:
    """No tokenizer makes more tokens of a text than it has bytes, and an end token for each document.

    Of compressed files and tables the bytes say nothing; ids have one byte at least.
    """
    endings = (".npy", ".bin") if config.data.corpus == "tokens" else (".txt", ".jsonl")
    size = sum(os.path.getsize(file) for file in files)
    most, training = size + len(files), config.training
    enough = most > training.global_batch_size * training.seq_len
    if not enough and all(file.endswith(endings) and not _is_compressed(file) for file in files):
        raise ConfigError(
            f"{key}: the split must fill one global batch: training.global_batch_size = {training.global_batch_size} "
            f"sequences of training.seq_len = {training.seq_len} tokens; {len(files)} file(s) of {size} bytes have at "
            f"most {most} tokens.",
            "Give more text, or lower training.global_batch_size or training.seq_len.",
        )


def _is_compressed(file: str) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX"))


def _check_own_parts(config: Config) -> None:
    """A package of one's own has to be there; what is in it is seen when it is imported, which needs torch."""
    for key, name in (
        *(("moe.router", name) for name in dict.fromkeys((config.moe.router, *config.moe.router_by_layer))),
        ("data.corpus", config.data.corpus),
        ("training.loss", config.training.loss),
    ):
        package = name.partition(":")[0].partition(".")[0]
        if names_object(name) and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key} = {name!r}: there is no module {package!r} (from {os.getcwd()!r}).",
                "Check the spelling, and that the module can be imported from here (PYTHONPATH).",
            )


def _check_initial(config: Config) -> None:
    """A new run's first weights lie in a Hugging Face folder, a run, or one of its checkpoints."""
    folder = Path(config.checkpoint.initial)
    if not config.checkpoint.initial or (Path(config.run.folder) / "run.json").is_file():
        return
    marks = [folder / "config.json", folder / "config.toml"]
    if not (folder.is_dir() and (folder.name.startswith("step-") or any(mark.is_file() for mark in marks))):
        raise ConfigError(
            f"checkpoint.initial = {config.checkpoint.initial!r} must be a Hugging Face folder (with config.json), a "
            f"run's, or one of its step-<step> folders (from {os.getcwd()!r}).",
            "Set checkpoint.initial to one of these.",
        )


def _check_run_folder(config: Config) -> None:
    """The nearest folder that exists has to be one, and one may write there."""
    place = Path(config.run.folder)
    try:
        existing = next(folder for folder in (place, *place.parents) if folder.exists() or folder == folder.parent)
    except PermissionError:
        raise ConfigError(
            f"run.folder = {config.run.folder!r} cannot be used: a folder above it may not be entered.",
            "Set run.folder to a folder that can be written.",
        ) from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "may not be written" if existing.is_dir() else "is no folder"
        raise ConfigError(
            f"run.folder = {config.run.folder!r} cannot be used: {str(existing)!r} {why}.",
            "Set run.folder to a folder that can be written.",
        )


def _check_sinks(config: Config) -> None:
    """What ``[metrics]`` asks for has to be installed, and to let this user in."""
    if config.metrics.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.wandb = true needs the package wandb, which is not installed.",
            'Run `pip install "moe_dtensor[wandb]"` (from a clone: `pip install -e ".[wandb]"`), '
            "or set metrics.wandb = false.",
        )
    if config.metrics.wandb and not _may_log_to_wandb():
        raise ConfigError(
            "metrics.wandb = true, but this account is not logged in to Weights & Biases.",
            "Run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline.",
        )


def _may_log_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
