"""A Hugging Face folder to a native one and back. Nothing appears under its name before it is whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_dtensor.checkpoint.hugging_face.export import Done, Export, appear, copy_tokenizer
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.checkpoint.hugging_face.translate import function_of, unpublished
from moe_dtensor.checkpoint.native import CONFIG_FILE, find_native, write_native
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import dump_changes
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config


def to_native(source: str | Path, output: str | Path, dtype: str | None = None) -> str:
    """Convert a Hugging Face folder into one with ``config.toml`` and a checkpoint of step 0.

    Args:
        dtype: of the weights; None: as in the files.

    Returns:
        A line on what was written.

    Raises:
        ConfigError: see :class:`.source.HuggingFaceSource`; or the output folder is not empty.
    """
    output = check_output(output)
    weights = HuggingFaceSource(source)
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith("router.bias")}
    dtypes = {name: getattr(torch, dtype) if dtype else weights.dtype(name) for name in shapes}
    config = _starting_from(weights, Path(source), output)
    config = replace(config, run=replace(config.run, folder=f"outputs/{output.name}"))
    with hidden_folder(output) as hidden, progress("Reading", sum(_size(shapes[n], dtypes[n]) for n in shapes)) as done:

        def value(name: str) -> torch.Tensor:
            out = torch.empty(shapes[name], dtype=dtypes[name])
            weights.read(name, whole(shapes[name]), out)
            done(out.numel() * out.element_size())
            return out

        copy_tokenizer(Path(source), hidden)
        (hidden / CONFIG_FILE).write_text(config_text(config, weights), encoding="utf-8")
        write_native(
            hidden / config.checkpoint.folder,
            {name: (shapes[name], dtypes[name]) for name in shapes},
            value,
            _balance(weights),
        )
    kind = weights.described.family.model_type
    return f"{output}: {kind}, {len(shapes)} tensors; start with --config {output / CONFIG_FILE}"


def config_only(source: str | Path, output: str | Path) -> str:
    """Write the TOML of a Hugging Face folder: a file that ends in .toml, or config.toml in a folder.

    The run that it describes starts from that folder.
    """
    weights = HuggingFaceSource(source)
    path = Path(output) if str(output).endswith(".toml") else Path(output) / CONFIG_FILE
    if path.exists():
        raise ConfigError(f"{path} is there already.", "Name another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_text(_starting_from(weights, Path(source), Path(source)), weights), encoding="utf-8")
    return f"{path}: {weights.described.family.model_type}; set [data], [training] and [mesh], then train"


def to_hugging_face(
    source: str | Path, output: str | Path, dtype: str | None = None, architecture: str = "auto"
) -> str:
    """Convert a run or a checkpoint into a Hugging Face folder.

    Args:
        dtype: of the weights; None: what the run computed in.
        architecture: a ``model_type``, or auto.

    Raises:
        ConfigError: no published class holds the model; the input is no run; the output folder is not empty.
    """
    output = check_output(output)
    native = find_native(source)
    exported = Export(native.config, native.checkpoint, dtype, architecture)
    with hidden_folder(output) as hidden, progress("Writing", exported.plan.size) as done:
        exported.write_shards(hidden, (0, 1), done)
        exported.write_rest(hidden)
    family = exported.plan.family
    told = f"{output}: {family.architecture}, {len(exported.plan.parts)} tensors, {exported.dtype}"
    odd = unpublished(family, function_of(native.config))
    if exported.left_out:
        told += f"\nnote: multi-token prediction is left out: {family.model_type} has no place for it"
    return f"{told}\nnote: {'; '.join(odd)}: some inference engines take that for granted" if odd else told


def config_text(config: Config, weights: HuggingFaceSource) -> str:
    """The TOML with only what it changes, and a line on where it comes from."""
    described = weights.described
    longest = f"; it was made for {described.max_positions} positions" if described.max_positions else ""
    head = f"# {described.family.model_type} from {weights.folder}, weights in {described.dtype}{longest}."
    return f"{head}\n\n{dump_changes(config)}"


def check_output(output: str | Path) -> Path:
    """The path, if nothing is there or an empty folder."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} is not empty.", "Name a new folder.")
    return output


@contextmanager
def hidden_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that takes its name when the block ends well, and goes when it does not."""
    hidden = output.parent / f".{output.name}.partial"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be made: {error.strerror}.", "Name another folder.") from None
    try:
        yield hidden
        appear(hidden, output)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def progress(word: str, total: int) -> Iterator[Done]:
    """A bar of bytes on stderr; call what it gives with the bytes of each tensor."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(word, total=total)
        yield lambda size: bar.advance(task, size)


def _balance(weights: HuggingFaceSource) -> dict[str, torch.Tensor]:
    """As :class:`moe_dtensor.model.balance_state.BalanceState` saves it."""
    layers, experts = sorted(moe_layers(weights.config)), weights.config.moe.num_experts
    bias_LE = torch.zeros(len(layers), experts)
    for number, layer in enumerate(layers):
        weights.read(f"layers.{layer}.moe.router.bias", [(0, experts)], bias_LE[number])
    return {"bias": bias_LE, "previous_load": torch.zeros(len(layers), experts, dtype=torch.float64)}


def _starting_from(weights: HuggingFaceSource, source: Path, folder: Path) -> Config:
    """The config of a run that starts from ``folder``, which has the tokenizer of ``source`` if there is one."""
    config = weights.written_config
    tokenizer = str(folder) if (source / "tokenizer.json").is_file() else config.data.tokenizer
    return replace(
        config,
        checkpoint=replace(config.checkpoint, initial=str(folder)),
        data=replace(config.data, tokenizer=tokenizer),
    )


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
