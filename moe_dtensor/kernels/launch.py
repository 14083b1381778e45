"""Launch Triton kernels with little work on the host: small layers are bound by it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILED: dict[tuple, tuple[Any, Any, tuple[Callable, ...]]] = {}
_MAX_ENCODED = 512


class Launcher:
    """A kernel with everything but its tensors; call it with those.

    Make one for each combination of shapes, dtypes and device, and keep it (``functools.lru_cache``): what Triton looks
    up anew at every launch is looked up once. The kernel's parameters are tensors, then numbers, then
    ``tl.constexpr``.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs on each axis.
        numbers: integers and floats, in the kernel's order.
        descriptors: for each of the first tensors, how it is seen by bulk loads and stores: see :func:`describe`.
        num_warps: warps of a program.
        num_stages: buffers of the software pipeline.
        constants: the ``tl.constexpr`` parameters, in the kernel's order.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...] = (),
        descriptors: tuple[dict[str, Any], ...] = (),
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.descriptors, self.constants = descriptors, constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.run: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the first tensor's device."""
        # Addresses, not tensors: the driver is then not asked about each.
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if bits % 16 or self.run is None:
            self._by_triton_or_bind(tensors, bits)
            return
        args: list[Any] = addresses
        if self.descriptors:
            args = self._encode(tensors, addresses) + addresses[len(self.descriptors) :]
        self.run(*self.head, torch._C._cuda_getCurrentRawStream(self.device), *self.handles, *args, *self.tail)

    def _by_triton_or_bind(self, tensors: tuple[Tensor | None, ...], bits: int) -> None:
        """Triton's own launch for interpreted kernels and tensors that begin anywhere; else look up what to run."""
        if bits % 16 or not isinstance(self.kernel, triton.JITFunction):
            self._by_triton(tensors)
            return
        first = tensors[0]
        assert first is not None
        # All that Triton compiles into the kernel.
        key = (
            id(self.kernel),
            first.get_device(),
            *[None if tensor is None else tensor.dtype for tensor in tensors],
            *[type(x) is int and (x == 1, x % 16 == 0, -(2**31) <= x < 2**31) for x in self.numbers],
            *[tuple(descriptor["block_shape"]) for descriptor in self.descriptors],
            *self.constants.values(),
            *self.options.values(),
        )
        known = _COMPILED.get(key)
        if known is None:
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            assert names == list(self.constants), "constants must follow tensors and numbers, in the kernel's order"
            compiled = self._by_triton(tensors)
            _COMPILED[key] = (compiled, *_without_encoding(compiled.run))
        compiled, run, self.encoders = _COMPILED[key]
        self.device, self.head = first.get_device(), (*self.grid, 1, 1)[:3]
        # None: neither metadata for, nor hooks of, Triton's own profiler.
        self.handles = (compiled.function, compiled.packed_metadata, None, None, None)
        self.tail = (*self.numbers, *self.constants.values())
        self.encoded: list[dict[int, list[Any]]] = [{} for _ in self.encoders]
        self.run = run
        if known is not None:
            self(*tensors)

    def _encode(self, tensors: tuple[Tensor | None, ...], addresses: list[int]) -> list[Any]:
        """What the launcher takes for the first tensors: a descriptor depends on nothing but the tensor's address."""
        if not self.encoders:
            return self._describe(tensors)
        args: list[Any] = []
        for slot, encoded in enumerate(self.encoded):
            known = encoded.get(addresses[slot])
            if known is None:
                if len(encoded) >= _MAX_ENCODED:
                    encoded.clear()
                known = encoded[addresses[slot]] = self.encoders[slot](self._describe(tensors)[slot])
            args += known
        return args

    def _by_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        args = [*self._describe(tensors), *tensors[len(self.descriptors) :]]
        return self.kernel[self.grid](*args, *self.numbers, **self.options, **self.constants)

    def _describe(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        # Without the checks of the constructor, which take longer than the launch: `grouped.check` has made them.
        made = []
        for tensor, fields in zip(tensors, self.descriptors, strict=False):
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(fields, base=tensor)
            made.append(descriptor)
        return made


def _without_encoding(run: Any) -> tuple[Any, tuple[Callable, ...]]:
    """Triton's launcher less the part that encodes every descriptor anew, and an encoder for each descriptor.

    That part is a closure in Triton 3.6 and 3.7. Where it looks otherwise, for a kernel without descriptors, and on a
    GPU that has none (what is passed then holds the tensor): the launcher as it is, no encoder.
    """
    try:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        cells = inspect.getclosurevars(run.launch).nonlocals
        bare, metadata = copy.copy(run), cells["tensordesc_meta"]
        bare.launch = cells["launcher"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return run, ()
    if None in metadata:
        return run, ()
    return bare, tuple(partial(make_tensordesc_arg, metadata=each) for each in metadata)


def describe(shape: list[int], block_shape: list[int], strides: list[int] | None = None) -> dict[str, Any]:
    """How bulk loads and stores see a tensor of this shape, contiguous unless strides are given."""
    if strides is None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
    return {
        "shape": shape,
        "strides": strides,
        "block_shape": block_shape,
        "padding": "zero",
        "round_f32_to_tf32": False,
    }


def describe_ragged(columns: int, block_shape: list[int]) -> dict[str, Any]:
    """Rows of so many columns, clipped at an expert's end: see ``triton.tools.ragged_tma``, whose idea it is."""
    far = 1 << 30
    shape, strides = [0x7FFF0000, 0x7FFF0000, far, columns], [(1 << 34) - columns, columns, columns, 1]
    return describe(shape, [1, 1, *block_shape], strides)


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up (Triton's own takes ten microseconds)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The lowest power of two that is at least ``n`` (n >= 1)."""
    return 1 << (n - 1).bit_length()
