"""AdamW over the model parts of one rank, with a state that any mesh can load.

Moments may have another dtype than the weights: half the memory in bfloat16, with torch's own update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from moe_dtensor.config.resolve import state_dtype
from moe_dtensor.config.schema import Config, LrScheduler
from moe_dtensor.config.stages import peak_lr
from moe_dtensor.parallel.gradients import local_part

PIECE = 1 << 26
"""Elements that are widened at a time."""


class NarrowMomentsAdamW(AdamW):
    """Widens a piece of weight, gradient and moments, lets torch's fused AdamW update them, and rounds what is kept."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients; on a GPU not at all where ``found_inf`` is above 0."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        kept = [_flat(x) for x in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        beta1, beta2 = group["betas"]
        done = state["step"]
        # A rank may hold nothing of a parameter; its count of steps goes on with the others'.
        for pieces in zip(*(x.split(PIECE) for x in kept), strict=True):
            done = state["step"].clone()
            wide = [x.to(torch.promote_types(pieces[0].dtype, pieces[2].dtype)) for x in pieces]
            weight, grad, first, second = ([x] for x in wide)
            adamw(
                *(weight, grad, first, second, [], [done]),
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for x, y in zip(pieces, wide, strict=True):
                if x is not y and x is not pieces[1]:
                    x.copy_(y)
        state["step"].copy_(done)


def _flat(x: Tensor | None) -> Tensor:
    assert x is not None
    return local_part(x).detach().view(-1)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Optimizers:
    """One AdamW for each model part (pipeline stage) of this rank, stepped together.

    The state's keys are ``state.<parameter name>.{step,exp_avg,exp_avg_sq}``: free of the mesh, of the
    split into stages and of the numbering of parameters. Hyperparameters are not part of the state:
    after a resume they are those of the TOML.
    """

    def __init__(self, parts: list[nn.Module], config: Config) -> None:
        options = config.optimizer
        self._parts = parts
        self._optimizers: list[Optimizer] = []
        same = state_dtype(config) == config.training.dtype
        self._dtype = None if same else getattr(torch, state_dtype(config))
        kind = AdamW if same else NarrowMomentsAdamW
        for part in parts:
            optimizer = kind(
                parameter_groups(part, options.weight_decay, options.router_lr),
                lr=options.lr,
                betas=(options.beta1, options.beta2),
                eps=options.eps,
                fused=True,
            )
            _fill_state(optimizer, self._dtype)
            self._optimizers.append(optimizer)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._optimizers)

    def step(self) -> None:
        """Update the parameters of all parts by their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    def drop_frozen(self) -> None:
        """Gradients of what is frozen become 0, so that they are no part of the norm."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["lr_factor"] == 0 else ():
                    if parameter.grad is not None:
                        parameter.grad.zero_()

    def zero_grad(self) -> None:
        """Drop the gradients of all parts."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Flat optimizer state of all parts; tensors are those of the optimizers, not copies."""
        return {key: value for key, value in self._with_groups().items() if key.startswith("state.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments and step counts; groups keep their hyperparameters."""
        groups = {key: value for key, value in self._with_groups().items() if key.startswith("param_groups.")}
        for part, optimizer in zip(self._parts, self._optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict={**groups, **state_dict}, options=_FLAT)
            if self._dtype is not None:  # torch gave moments the weights' dtype
                for state in optimizer.state.values():
                    state |= {name: state[name].to(self._dtype) for name in ("exp_avg", "exp_avg_sq")}

    def _with_groups(self) -> dict[str, Any]:
        """State and hyperparameters of all parts, by parameter name."""
        merged: dict[str, Any] = {}
        for part, optimizer in zip(self._parts, self._optimizers, strict=True):
            merged |= get_optimizer_state_dict(part, optimizer, options=_FLAT)
        return merged


def build_optimizers(parts: list[nn.Module], config: Config) -> Optimizers:
    """AdamW as ``[optimizer]`` describes it, over parameters that are on their device already.

    Args:
        parts: the model parts of this rank, sharded or plain; parameter names are unique over the parts.
    """
    return Optimizers(parts, config)


def parameter_groups(part: nn.Module, weight_decay: float, router_lr: float = 1.0) -> list[dict[str, Any]]:
    """Three groups: decayed parameters, those that are not (norms, embeddings), and routers, which are not either.

    A separate output head is decayed; one tied to the embedding is the embedding. ``lr_factor`` of a group is what the
    learning rate is multiplied by; 0 freezes it.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    routers: list[nn.Parameter] = []
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            group = routers if is_router(name) else decayed if is_decayed(name, parameter) else kept
            group.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": kept, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": routers, "weight_decay": 0.0, "lr_factor": router_lr},
    ]
    return [group for group in groups if group["params"]]


def is_router(name: str) -> bool:
    """Whether a parameter is a router's, by its name."""
    return "router" in name.split(".")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter, by its name; vectors (norm weights) and biases never are."""
    embedding = "tok_embeddings" in name.split(".")
    return parameter.ndim > 1 and not (name.endswith("bias") or embedding or is_router(name))


def _fill_state(optimizer: Optimizer, dtype: torch.dtype | None) -> None:
    """Create AdamW's state now, as its first step would.

    A checkpoint may be loaded or saved before the first step; torch would then make the state by a step
    on zero gradients, which counts as a step and divides 0 by 0 where eps is 0.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.detach(), dtype=dtype),
                "exp_avg_sq": torch.zeros_like(parameter.detach(), dtype=dtype),
            }


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
    """Sets the learning rate of every optimizer of this rank: one value, times each parameter group's factor.

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
                group["lr"] = self._lr * group.get("lr_factor", 1.0)


def build_schedulers(optimizers: Iterable[Optimizer], config: Config) -> Schedule:
    """The schedule that ``[lr_scheduler]`` describes, set to the first step."""
    return Schedule(optimizers, config)
