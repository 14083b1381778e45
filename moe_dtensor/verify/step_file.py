"""A step of another trainer, judged by the oracle; and the file that holds it. Format: docs/verify.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build, override
from moe_dtensor.config.resolve import padded_vocab, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.inputs import parameter_shapes
from moe_dtensor.verify.miniature import judged
from moe_dtensor.verify.oracle import Answer, Microbatch, gradient_norm, one_step
from moe_dtensor.verify.run import UPDATE_FLOOR, limits_of
from moe_dtensor.verify.verdict import FLOOR, Deviation, Verdict, deviate, deviate_scalar, missing

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


def judge_step(step: StepFile) -> Verdict:
    """Loss, every gradient and, where it is told, every update against the oracle's; ``mesh`` is the trainer.

    The routing is the oracle's own: a token that nearly ties is sent elsewhere by a narrow dtype, so give weights and
    tokens of which none does.

    Raises:
        ConfigError: shapes that the config does not have, or a config that the oracle does not know.
    """
    config = _config(step)
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        if name in step.weights and tuple(step.weights[name].shape) != shape:
            raise ConfigError(
                f"{name} ({step.names[name]}) has shape {tuple(step.weights[name].shape)}, not {shape}.",
                "Mend the names' mapping or the config in the step file.",
            )
    if lost := sorted(set(expected) - set(step.weights)):
        raise ConfigError(f"The step file names no {', '.join(lost[:4])}.", "Map every parameter of the config.")
    size = config.training.microbatch_size
    rows = (range(i, min(i + size, len(step.tokens))) for i in range(0, len(step.tokens), size))
    batch = [Microbatch(step.tokens[r.start : r.stop], step.labels[r.start : r.stop], numbers=r) for r in rows]
    answer = one_step(config, step.weights, batch)
    return Verdict(step.trainer, "none", tuple(_compare(step, config, answer)))


def _config(step: StepFile) -> Config:
    """Resolved on one rank; the batch is the file's."""
    rows, length = step.tokens.shape
    changes = {"training.seq_len": length, "training.global_batch_size": rows, "mesh.dp": 1, "mesh.dp_replicate": 1}
    config = resolve(override(judged(step.config, step.dtype), changes), 1)
    if padded_vocab(config) != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is no multiple of 64, to which embeddings are padded here.",
            "Give a vocabulary that is.",
        )
    return config


def _compare(step: StepFile, config: Config, answer: Answer) -> Iterator[Deviation]:
    limits = limits_of(config)
    yield deviate_scalar("loss", "loss", step.loss, answer.loss, limits["loss"])
    scale = gradient_norm(answer.gradients, 2.0)
    for name, right in answer.gradients.items():
        found = step.gradients.get(name)
        if found is None:
            yield missing(name, "gradient", limits["gradient"])
        else:
            yield deviate(name, "gradient", found, right, limits["gradient"], scale)
    for name, after in step.after.items():
        moved, right = (
            after.double() - step.weights[name].double(),
            answer.parameters[name] - step.weights[name].double(),
        )
        floor = config.optimizer.lr * right.numel() ** 0.5 * UPDATE_FLOOR / FLOOR
        yield deviate(name, "update", moved, right, limits["update"], floor)


def explain(step: StepFile, verdict: Verdict) -> list[str]:
    """What differs, worst first, by the trainer's own names."""
    return [f"{d.kind} of {step.names.get(d.name, d.name)} ({d.name}): {d.told}" for d in verdict.failures()]
