"""What all kernels share: registering operators with PyTorch, so that ``torch.compile`` sees each as one
opaque node, and finding and sizing their Triton side."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("moe_dtensor", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Register an operator and return it.

    Args:
        schema: ``name(Tensor x, ...) -> ...`` without a namespace. The operator is functional: it writes only to
            tensors it made, and returns none of its inputs.
        run: computes it, on any device.
        fake: makes empty outputs of the right shape, for tracing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_dtensor::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.moe_dtensor, name).default

    def call(*args):
        # Small layers are bound by the host: go round the dispatcher where it has nothing to do.
        return operator(*args) if is_traced() else run(*args)

    return call


def is_traced() -> bool:
    """Whether a compiler, or anyone else, watches operators: then all must go through the dispatcher."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@cache
def triton_kernels(module: str) -> ModuleType:
    """The Triton side of a module of this room, ``<module>_triton``: loaded when first needed, as Triton is."""
    return import_module(f"{__package__}.{module}_triton")


def launches_triton(x: Tensor) -> bool:
    """Whether kernels on this tensor are Triton's: on a GPU, or anywhere under Triton's interpreter (tests)."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up (Triton's own takes ten microseconds)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The lowest power of two that is at least ``n`` (n >= 1)."""
    return 1 << (n - 1).bit_length()
