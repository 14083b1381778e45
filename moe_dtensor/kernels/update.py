"""What becomes of a parameter's gradients, element by element: they are added up over microbatches in a wider dtype
than they come in, and AdamW updates the weight in float32, of whatever dtypes weight and moments are kept in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dtensor.kernels.library import launches_triton, triton_kernels

WORTH = 1 << 22
"""Elements from which on a kernel of ours saves more of the GPU's time than its launch takes of the host's."""


def widened(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``grad`` in ``dtype``."""
    if not _adds_by_kernel(grad, dtype):
        return grad.to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    triton_kernels("update").accumulate(out, grad, first=True)
    return out


def add_narrow(total: Tensor, grad: Tensor) -> None:
    """``total += grad``, computed in the dtype of ``total``. torch's own takes twice as long where dtypes differ."""
    if _adds_by_kernel(grad, total.dtype) and total.is_contiguous():
        triton_kernels("update").accumulate(total, grad, first=False)
    else:
        total += grad


def _adds_by_kernel(grad: Tensor, dtype: torch.dtype) -> bool:
    narrow = grad.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    return launches_triton(grad) and narrow and grad.is_contiguous() and grad.numel() >= WORTH


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
    """Whether :func:`adamw` takes these: on a GPU, contiguous, none wider than float32, and a weight in bfloat16. For
    a float32 weight beside bfloat16 moments torch's update of widened pieces is the faster one."""
    narrow = (torch.float32, torch.bfloat16, torch.int16)
    fits = all(x.is_contiguous() and x.dtype in narrow for x in tensors)
    return fits and launches_triton(tensors[0]) and tensors[0].dtype == torch.bfloat16


def adamw(
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
    triton_kernels("update").adamw(tensors, step, corrections, skipped, numbers, chance)
    step += 1 - skipped
