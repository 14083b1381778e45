"""A training step of any trainer as a file: what it was given and what it made of it. Format: docs/verify.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build
from moe_dtensor.config.schema import Config

FORMAT = 1
GROUPS = ("weights", "gradients", "after")
Name = str | Mapping[str, Any]
"""Of a parameter in the trainer: its key, or ``{"from": key or keys, "shape": [...], "stack": dim}``."""


@dataclass(frozen=True)
class StepFile:
    """A step, with parameters by our names."""

    config: Config
    trainer: str
    dtype: str
    loss: float
    tokens: Tensor
    labels: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]
    """Empty where the trainer did not tell."""
    names: dict[str, str]
    """What the trainer calls each parameter."""


def write_step_file(
    path: Path,
    *,
    config: Mapping[str, Mapping[str, Any]],
    trainer: str,
    dtype: str,
    loss: float,
    batch: Mapping[str, Tensor],
    tensors: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, Name],
) -> None:
    """Write ``path`` (JSON), and its tensors beside it (.safetensors).

    Args:
        path: ends in ``.json``.
        config: tables of a TOML: model, moe, training, optimizer.
        trainer: what made the step, with its version.
        dtype: of the computation: float64, float32 or bfloat16.
        loss: mean cross-entropy of the target tokens, without auxiliary losses.
        batch: ``tokens`` and ``labels``, ``(sequences, S)``; -100 is no target.
        tensors: ``weights``, ``gradients`` and, where there was an update, ``after``, by the trainer's own keys.
        names: of each of our parameters, where it is in the trainer.
    """
    flat = {f"batch/{name}": value.contiguous() for name, value in batch.items()}
    for group, members in tensors.items():
        flat |= {f"{group}/{name}": value.detach().cpu().contiguous().clone() for name, value in members.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, path.with_suffix(".safetensors"))
    text = {
        "format": FORMAT,
        "trainer": trainer,
        "dtype": dtype,
        "loss": loss,
        "tensors": path.with_suffix(".safetensors").name,
        "config": config,
        "names": names,
    }
    write_json(path, text)


def read_step_file(path: Path) -> StepFile:
    """Read what :func:`write_step_file`, or another program, wrote.

    Raises:
        ConfigError: it is no step file, or lacks something.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path.parent / text["tensors"])
        if text["format"] != FORMAT:
            raise ConfigError(f"{path}: format {text['format']} is not known.", f"Write format {FORMAT}.")
        groups = {group: _ours(tensors, group, text["names"]) for group in GROUPS}
        return StepFile(
            config=build(text["config"]),
            trainer=text["trainer"],
            dtype=text["dtype"],
            loss=float(text["loss"]),
            tokens=tensors["batch/tokens"],
            labels=tensors["batch/labels"],
            names={name: _told(where) for name, where in text["names"].items()},
            **groups,
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no step file: {type(error).__name__}: {error}.", "docs/verify.md has the format."
        ) from error


def _ours(tensors: Mapping[str, Tensor], group: str, names: Mapping[str, Name]) -> dict[str, Tensor]:
    """The tensors of one group by our names; none if the group is absent."""
    if group == "after" and not any(key.startswith("after/") for key in tensors):
        return {}
    found = {}
    for ours, where in names.items():
        rule: Mapping[str, Any] = {"from": where} if isinstance(where, str) else where
        keys = [rule["from"]] if isinstance(rule["from"], str) else rule["from"]
        parts = [tensors[f"{group}/{key}"] for key in keys]
        value = torch.stack(parts, rule["stack"]) if "stack" in rule else parts[0]
        found[ours] = value.reshape(rule["shape"]) if "shape" in rule else value
    return found


def _told(where: Name) -> str:
    source = where if isinstance(where, str) else where["from"]
    return source if isinstance(source, str) else " and ".join(source)
