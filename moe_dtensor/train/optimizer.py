"""AdamW over the model parts of one rank, with a state that any mesh can load.

Moments may have another dtype than the weights, and weights in bfloat16 may be rounded by chance or keep their 16 low
bits aside: half the memory of a tensor or more. The update is torch's own, but for weights in bfloat16 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from moe_dtensor.config.resolve import state_dtype
from moe_dtensor.config.schema import Config, LrScheduler
from moe_dtensor.config.stages import peak_lr
from moe_dtensor.kernels.update import Numbers, has_kernel
from moe_dtensor.kernels.update import adamw as adamw_kernel
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.train.rounding import Chance, join, round_by_chance, split

PIECE = 1 << 24
"""Elements that are widened at a time."""
REMAINDER = "remainder"
"""Key of the optimizer's state under ``optimizer.rounding = remainder``."""


class WideningAdamW(AdamW):
    """Widens weight, gradient and moments, updates them, and rounds what is kept: moments to the nearest, weights as
    ``optimizer.rounding`` has it. Weights in bfloat16 on a GPU in one kernel, all else a piece at a time by torch's
    fused AdamW."""

    chance: dict[Tensor, Chance] | None = None
    """Of each parameter, where weights are rounded by chance."""

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
        names = ["exp_avg", "exp_avg_sq", *([REMAINDER] if REMAINDER in state else [])]
        kept = [_flat(x) for x in (parameter, parameter.grad, *(state[name] for name in names))]
        beta1, beta2 = group["betas"]
        place = self.chance[parameter].elements if self.chance is not None else None
        if has_kernel(tuple(kept)) and (self.chance is None or place is not None):
            numbers = Numbers(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            adamw_kernel(tuple(kept), state["step"], numbers, place, getattr(self, "found_inf", None))
            return
        done, start = state["step"], 0
        # A rank may hold nothing of a parameter; its count of steps goes on with the others'.
        for pieces in zip(*(x.split(PIECE) for x in kept), strict=True):
            done = state["step"].clone()
            weight, grad, first, second = self._widened(pieces)
            adamw(
                *([weight], [grad], [first], [second], [], [done]),
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
            for piece, wide in ((pieces[2], first), (pieces[3], second)):
                if piece is not wide:
                    piece.copy_(wide)
            if len(pieces) == 5:
                for piece, part in zip((pieces[0], pieces[4]), split(weight), strict=True):
                    piece.copy_(part)
            elif self.chance is not None:
                chance = self.chance[parameter].draw(start, start + len(weight), state["step"])
                pieces[0].copy_(round_by_chance(weight, chance))
            elif pieces[0] is not weight:
                pieces[0].copy_(weight)
            start += len(weight)
        state["step"].copy_(done)

    def _widened(self, pieces: tuple[Tensor, ...]) -> list[Tensor]:
        """Weight, gradient and moments in the dtype that they are updated in."""
        weight, _, first, *_ = pieces
        exact = len(pieces) == 5 or self.chance is not None
        dtype = torch.float32 if exact else torch.promote_types(weight.dtype, first.dtype)
        wide = [x.to(dtype) for x in pieces[:4]]
        if len(pieces) == 5:
            wide[0] = join(weight, pieces[4])
        return wide


def _flat(x: Tensor | None) -> Tensor:
    assert x is not None
    return local_part(x).detach().view(-1)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Optimizers:
    """One AdamW for each model part (pipeline stage) of this rank, as ``[optimizer]`` describes it, stepped together.

    The state's keys are ``state.<parameter name>.{step,exp_avg,exp_avg_sq}``, and ``remainder`` where low bits of
    weights are kept: free of the mesh, of the split into stages and of the numbering of parameters. Hyperparameters are
    not part of the state: after a resume they are those of the TOML.

    Args:
        parts: the model parts of this rank, sharded or plain, on their device already; parameter names are unique over
            the parts.
    """

    def __init__(self, parts: Sequence[nn.Module], config: Config) -> None:
        options = config.optimizer
        self._parts = parts
        self._optimizers: list[Optimizer] = []
        same = state_dtype(config) == config.training.dtype
        dtype = None if same else getattr(torch, state_dtype(config))
        kind = AdamW if same and options.rounding == "nearest" else WideningAdamW
        for part in parts:
            optimizer = kind(
                parameter_groups(part, options.weight_decay, options.router_lr),
                lr=options.lr,
                betas=(options.beta1, options.beta2),
                eps=options.eps,
                fused=True,
            )
            _fill_state(optimizer, dtype, options.rounding == "remainder")
            if options.rounding == "stochastic":
                seed = config.training.seed
                names = {p: plain_name(name) for name, p in part.named_parameters()}
                optimizer.chance = {p: Chance(p, name, seed) for p, name in names.items()}  # type: ignore[attr-defined]
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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments, remainders and step counts, in place; groups keep their hyperparameters.

        Remainders that are not given are 0: the weight is what its bfloat16 says.

        Raises:
            KeyError: something else is not given.
        """
        for key, value in self.state_dict().items():
            if key not in state_dict and key.endswith(f".{REMAINDER}"):
                value.zero_()
            else:
                local_part(value).copy_(local_part(state_dict[key]))

    def _with_groups(self) -> dict[str, Any]:
        """State and hyperparameters of all parts, by parameter name."""
        merged: dict[str, Any] = {}
        for part, optimizer in zip(self._parts, self._optimizers, strict=True):
            merged |= get_optimizer_state_dict(part, optimizer, options=_FLAT)
        return merged


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


def plain_name(name: str) -> str:
    """A parameter's name without what recomputation and compilation put into it: its checkpoint key."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def is_router(name: str) -> bool:
    """Whether a parameter is a router's, by its name."""
    return "router" in name.split(".")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter, by its name; vectors (norm weights) and biases never are."""
    embedding = "tok_embeddings" in name.split(".")
    return parameter.ndim > 1 and not (name.endswith("bias") or embedding or is_router(name))


def _fill_state(optimizer: Optimizer, dtype: torch.dtype | None, remainder: bool) -> None:
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
            if remainder:
                optimizer.state[parameter][REMAINDER] = torch.zeros_like(parameter.detach(), dtype=torch.int16)


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
    """Sets the learning rate of every optimizer of this rank as ``[lr_scheduler]`` describes it: one value, times each
    parameter group's factor.

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
