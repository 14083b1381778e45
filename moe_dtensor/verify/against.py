"""Judge a step of another trainer by the oracle."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import padded_vocab, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.compare import FLOOR, Deviation, Verdict, deviate, deviate_scalar, missing
from moe_dtensor.verify.inputs import parameter_shapes
from moe_dtensor.verify.miniature import judged
from moe_dtensor.verify.oracle import Answer, Microbatch, gradient_norm, one_step
from moe_dtensor.verify.run import LIMITS, UPDATE_FLOOR
from moe_dtensor.verify.step_file import StepFile


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
    limits = LIMITS[step.dtype]
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
    failed = sorted((d for d in verdict.deviations if not d.ok), key=lambda d: d.severity, reverse=True)
    return [
        f"{d.kind} of {step.names.get(d.name, d.name)} ({d.name}): error {d.error:.2e} (limit {d.limit:.0e}), "
        f"{d.ratio:.6g} times the oracle's norm"
        for d in failed
    ]
