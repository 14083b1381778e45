"""Triton kernels of :mod:`.update`, bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_dtensor.kernels.library import ceil_div
from moe_dtensor.kernels.update import Elements, Numbers

_SUM_BLOCK = 4096
_ADAMW_BLOCK = 1024
_ALL = Elements((0, 0, 0), 0, 1, 1)


def accumulate(total: Tensor, grad: Tensor, first: bool) -> None:
    """``total = grad`` if it is the first, else ``total += grad``; both contiguous."""
    elements = grad.numel()
    _accumulate[(ceil_div(elements, _SUM_BLOCK),)](total, grad, elements, FIRST=first, BLOCK=_SUM_BLOCK)


@triton.jit
def _accumulate(total_ptr, grad_ptr, elements, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    grad = tl.load(grad_ptr + place, mask=inside).to(total_ptr.dtype.element_ty)
    if not FIRST:
        grad += tl.load(total_ptr + place, mask=inside)
    tl.store(total_ptr + place, grad, mask=inside)


def adamw(
    tensors: tuple[Tensor, ...],
    step: Tensor,
    corrections: Tensor,
    skipped: Tensor,
    numbers: Numbers,
    chance: Elements | None,
) -> None:
    """See :func:`moe_dtensor.kernels.update.adamw`."""
    elements = tensors[0].numel()
    if not elements:
        return
    place = chance or _ALL
    rounding = "remainder" if len(tensors) == 5 else "nearest" if chance is None else "stochastic"
    _update[(ceil_div(elements, _ADAMW_BLOCK),)](
        *(tensors if len(tensors) == 5 else (*tensors, tensors[0])),
        step,
        corrections,
        skipped,
        elements,
        numbers.lr,
        numbers.beta1,
        numbers.beta2,
        numbers.eps,
        numbers.weight_decay,
        place.base,
        place.run,
        place.stride,
        *place.keys,
        ROUNDING=rounding,
        IN_RUNS=place.run < elements,
        BLOCK=_ADAMW_BLOCK,
    )


@triton.jit(
    do_not_specialize=[
        "lr",
        "beta1",
        "beta2",
        "eps",
        "decay",
        "base",
        "run",
        "stride",
        "low",
        "high",
        "turn",
    ]
)
def _update(
    weight_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    remainder_ptr,
    step_ptr,
    corrections_ptr,
    skipped_ptr,
    elements,
    lr,
    beta1,
    beta2,
    eps,
    decay,
    base,
    run,
    stride,
    low,
    high,
    turn,
    ROUNDING: tl.constexpr,
    IN_RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(skipped_ptr) > 0:
        return
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    grad = tl.load(grad_ptr + place, mask=inside).to(tl.float32)
    first = tl.load(first_ptr + place, mask=inside).to(tl.float32)
    second = tl.load(second_ptr + place, mask=inside).to(tl.float32)
    weight = tl.load(weight_ptr + place, mask=inside)
    if ROUNDING == "remainder":
        rest = tl.load(remainder_ptr + place, mask=inside).to(tl.int32)
        bits = (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + rest
        weight = bits.to(tl.float32, bitcast=True)
    else:
        weight = weight.to(tl.float32)

    weight -= lr * decay * weight
    first += (1 - beta1) * (grad - first)
    second = beta2 * second + (1 - beta2) * grad * grad
    size = tl.sqrt_rn(second) / tl.sqrt_rn(tl.load(corrections_ptr + 1)) + eps
    weight -= lr / tl.load(corrections_ptr) * first / size

    tl.store(first_ptr + place, first.to(first_ptr.dtype.element_ty), mask=inside)
    tl.store(second_ptr + place, second.to(second_ptr.dtype.element_ty), mask=inside)
    if ROUNDING == "nearest":
        tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), mask=inside)
    elif ROUNDING == "remainder":
        bits = weight.to(tl.int32, bitcast=True)
        upper = (bits + 32768) >> 16
        tl.store(weight_ptr + place, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(remainder_ptr + place, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        element = base + (place // run) * stride + place % run if IN_RUNS else base + place
        chance = _draw(element, tl.load(step_ptr), low, high, turn)
        bits = (weight.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000
        tl.store(weight_ptr + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


@triton.jit
def _draw(element, updates, low, high, turn):
    """:meth:`moe_dtensor.train.rounding.Chance.draw`."""
    count = _mix(updates.to(tl.int32).to(tl.uint32) ^ turn.to(tl.uint32))
    upper = _mix((element >> 32).to(tl.uint32) ^ high.to(tl.uint32))
    return _mix(_mix(element.to(tl.uint32) ^ low.to(tl.uint32)) ^ upper ^ count) >> 16


@triton.jit
def _mix(x):
    """:func:`moe_dtensor.train.rounding._mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
