"""AdamW's update of one tensor in float32, of whatever dtypes weight, gradient and moments are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dtensor.kernels.library import launches_triton, triton_kernels


@dataclass(frozen=True)
class Elements:
    """Which elements of a whole tensor a rank holds, where they come in equally long runs: its i-th is number
    ``base + i // run * stride + i % run``. ``keys`` and these numbers are what rounding by chance draws from
    (:class:`moe_dtensor.train.rounding.Chance`)."""

    keys: tuple[int, int, int]
    base: int
    run: int
    stride: int


@dataclass(frozen=True)
class Numbers:
    """Hyperparameters of a parameter group, as torch names them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def has_kernel(tensors: tuple[Tensor, ...]) -> bool:
    """Whether :func:`update` takes these: on a GPU, contiguous, none wider than float32, and a weight in bfloat16. For
    a float32 weight beside bfloat16 moments torch's update of widened pieces is the faster one."""
    narrow = (torch.float32, torch.bfloat16, torch.int16)
    fits = all(x.is_contiguous() and x.dtype in narrow for x in tensors)
    return fits and launches_triton(tensors[0]) and tensors[0].dtype == torch.bfloat16


def update(
    tensors: tuple[Tensor, ...],
    step: Tensor,
    numbers: Numbers,
    chance: Elements | None,
    found_inf: Tensor | None,
) -> None:
    """AdamW with decoupled weight decay (arXiv:1711.05101, algorithm 2), in place, all in one pass.

    Args:
        tensors: weight, gradient, both moments, and the weight's low bits (int16) where they are kept, all of one size.
            The gradient is not written.
        step: updates so far, a float32 scalar on the device; one more afterwards.
        numbers: of the parameter group.
        chance: round the weight up or down by chance; None: to the nearest.
        found_inf: above 0: nothing is updated. None: everything is.
    """
    # No tensor of numbers is made on the host: bringing it to the device would wait for the device.
    count = step.double() + 1
    corrections = torch.stack([1 - numbers.beta1**count, 1 - numbers.beta2**count]).float()
    skipped = torch.zeros_like(step) if found_inf is None else (found_inf > 0).to(step.dtype).view(())
    triton_kernels("adamw").update(tensors, step, corrections, skipped, numbers, chance)
    step += 1 - skipped
