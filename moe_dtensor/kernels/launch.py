"""Launch Triton kernels with less work on the host: small layers are bound by it."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILED: dict[tuple, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """``kernel[grid](*args, **constants)``, remembering what Triton would look up again at every launch.

    Args:
        kernel: a ``triton.jit`` function. Its parameters are the ``args`` in order, then the ``constants`` in order.
        grid: programs on each axis.
        args: tensors, tensor descriptors, None, integers and floats. The first decides the device.
        num_warps: warps of a program.
        num_stages: buffers of the software pipeline.
        constants: its ``tl.constexpr`` parameters.
    """
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    first = args[0]
    device = (first if isinstance(first, Tensor) else first.base).get_device()
    key = (kernel, device, num_warps, num_stages, *constants.values(), *[_kind(arg) for arg in args])
    compiled = _COMPILED.get(key)
    if compiled is None:
        assert kernel.arg_names[len(args) :] == list(constants), "constants must follow, in the kernel's order"
        _COMPILED[key] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    # None: neither metadata for, nor hooks of, Triton's own profiler.
    compiled.run(
        *(*grid, 1, 1)[:3],
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *args,
        *constants.values(),
    )


def _kind(arg: Any) -> Any:
    """All of an argument that Triton compiles into the kernel."""
    kind = type(arg)
    if kind is int:
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    if kind is TensorDescriptor:
        return arg.base.dtype, *arg.block_shape
    if arg is None or kind is float:
        return kind
    return arg.dtype, arg.data_ptr() % 16 == 0


def describe(
    x: Tensor, block_shape: list[int], shape: list[int] | None = None, strides: list[int] | None = None
) -> Any:
    """A tensor descriptor for bulk loads and stores, of ``x`` itself unless a shape and strides are given.

    Made without the checks of its constructor, which take longer than the launch: ``grouped.check`` has made them.
    """
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(
        base=x,
        shape=list(x.shape) if shape is None else shape,
        strides=list(x.stride()) if strides is None else strides,
        block_shape=block_shape,
        padding="zero",
        round_f32_to_tf32=False,
    )
    return descriptor


def describe_ragged(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A descriptor of ``x``, two axes, that clips at an expert's end: see ``triton.tools.ragged_tma``, whose it is."""
    far = 1 << 30
    stride, shape = x.stride(0), [0x7FFF0000, 0x7FFF0000, far, x.shape[1]]
    return describe(x, [1, 1, *block_shape], shape, [(1 << 34) - stride, stride, stride, 1])


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up (Triton's own takes ten microseconds)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The lowest power of two that is at least ``n`` (n >= 1)."""
    return 1 << (n - 1).bit_length()
