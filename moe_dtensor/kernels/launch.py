"""Launch Triton kernels with less work on the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_COMPILED: dict[tuple, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """``kernel[grid](*args, **constants)``; what Triton would look up again, 20 microseconds of it, is remembered.

    Args:
        kernel: a ``triton.jit`` function. Its parameters are the ``args`` in order, then the ``constants`` in order.
        grid: programs on each axis.
        args: tensors, tensor descriptors, None, integers and floats.
        num_warps: warps of a program.
        num_stages: buffers of the software pipeline.
        constants: its ``tl.constexpr`` parameters.
    """
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    key = (kernel, torch.cuda.current_device(), num_warps, num_stages, *constants.values(), *map(_kind, args))
    compiled = _COMPILED.get(key)
    if compiled is None:
        assert kernel.arg_names[len(args) :] == list(constants), "constants must follow, in the kernel's order"
        _COMPILED[key] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    compiled[(*grid, 1, 1)[:3]](*args, *constants.values())


def _kind(arg: Any) -> Any:
    """All of an argument that Triton compiles into the kernel."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    if arg is None or isinstance(arg, float):
        return type(arg)
    return arg.base.dtype, *arg.block_shape
