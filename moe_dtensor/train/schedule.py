"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from moe_dtensor.config.schema import Config, LrScheduler
from moe_dtensor.config.stages import peak_lr


def lr_factor(step: int, steps: int, config: LrScheduler) -> float:
    """Learning rate of a step, as a share of the peak.

    Warm-up is linear from 0 and reaches the peak at step ``warmup_steps``; the decay then ends at
    ``min_lr_ratio`` on the last step.

    Args:
        step: the step about to be taken, counted from 1.
        steps: steps of the whole run.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    peak_step = max(config.warmup_steps, 1)
    decay_steps = steps - peak_step
    if config.decay == "wsd":
        decay_steps = min(decay_steps, round(config.decay_fraction * steps))
    done = step - (steps - decay_steps)
    progress = min(max(done / decay_steps, 0.0), 1.0) if decay_steps > 0 else 0.0
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * fall


class Schedule:
    """Sets the learning rate of every optimizer of this rank, one value for all parameter groups.

    The state is the number of steps taken and nothing else: it is the same on every rank and mesh, and
    after a resume the learning rate follows the TOML, also where the TOML was changed.
    """

    def __init__(self, optimizers: Iterable[Optimizer], config: Config) -> None:
        self._optimizers = list(optimizers)
        self._steps = config.training.steps
        self._config = config
        self._set_steps_taken(0)

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step."""
        return self._lr

    def step(self) -> None:
        """Move on to the next step's learning rate; call once after each step, skipped ones too."""
        self._set_steps_taken(self._steps_taken + 1)

    def state_dict(self) -> dict[str, int]:
        """``{"steps": steps taken}``."""
        return {"steps": self._steps_taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after ``state_dict["steps"]`` steps."""
        self._set_steps_taken(state_dict["steps"])

    def _set_steps_taken(self, steps_taken: int) -> None:
        self._steps_taken = steps_taken
        step = steps_taken + 1
        self._lr = peak_lr(self._config, step) * lr_factor(step, self._steps, self._config.lr_scheduler)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr


def build_schedulers(optimizers: Iterable[Optimizer], config: Config) -> Schedule:
    """The schedule that ``[lr_scheduler]`` describes, set to the first step."""
    return Schedule(optimizers, config)
