"""Weights in bfloat16, updated in float32: how what bfloat16 does not hold is kept, or left to chance.

A float32 number is a bfloat16 number and 16 bits more: both have one sign and eight bits of exponent.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dtensor.kernels.update import Elements

HALF = 1 << 15


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the nearest bfloat16 one (halfway: the one farther from 0) and an int16 remainder.

    Halfway cases do not go to the even neighbour, as casts have it: then ``(even, 32768)`` and ``(even, -32768)`` would
    both be needed, and 16 bits hold one of them.
    """
    bits = wide.view(torch.int32)
    high = (bits + HALF) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(narrow: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that was split, bit for bit."""
    return ((narrow.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def round_by_chance(wide: Tensor, chance: Tensor) -> Tensor:
    """A float32 tensor in bfloat16: up or down, the nearer neighbour as much more often as it is nearer.

    Args:
        chance: int32 in [0, 65536) of the same shape, each number alike likely.
    """
    return (((wide.view(torch.int32) + chance) >> 16) << 16).view(torch.float32).to(torch.bfloat16)


class Chance:
    """Numbers for :func:`round_by_chance` that follow from the run's seed, a parameter's name, how often it was updated
    and which of its elements is meant, and from nothing else: they are alike on every rank that holds it, on every
    mesh, and after a resume.

    Args:
        parameter: sharded or plain.
        name: its checkpoint key.
        seed: of the run.
    """

    def __init__(self, parameter: Tensor, name: str, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}/rounding/{name}".encode()).digest()
        self._keys = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4, 8)]
        self._shape, self._offset = tuple(parameter.shape), (0,) * parameter.ndim
        self._strides = [1] * parameter.ndim
        for axis in reversed(range(parameter.ndim - 1)):
            self._strides[axis] = self._strides[axis + 1] * parameter.shape[axis + 1]
        if isinstance(parameter, DTensor):
            self._shape, self._offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )

    @functools.cached_property
    def elements(self) -> Elements | None:
        """The elements that this rank holds; None where more than one axis after the first is cut, and they come in no
        equally long runs."""
        cut = [i for i in range(1, len(self._shape)) if self._shape[i] * self._strides[i] != self._strides[i - 1]]
        if len(cut) > 1:
            return None
        base = sum(offset * stride for offset, stride in zip(self._offset, self._strides, strict=True))
        run, stride = math.prod(self._shape), 0
        if cut:
            run, stride = self._shape[cut[0]] * self._strides[cut[0]], self._strides[cut[0] - 1]
        of_name, of_high, of_step = self._keys
        return Elements((of_name, of_high, of_step), base, run, stride)

    def draw(self, start: int, end: int, updates: Tensor) -> Tensor:
        """For elements ``start`` to ``end - 1`` of what this rank holds, int32 in [0, 65536).

        Args:
            updates: how many there were, a scalar on the parameter's device.
        """
        of_name, of_high, of_step = self._keys
        element = self._elements(start, end, updates.device)
        step = _mix(updates.to(torch.int32) ^ of_step)
        high = _mix((element >> 32).to(torch.int32) ^ of_high)
        mixed = _mix(_mix((element & 0xFFFFFFFF).to(torch.int32) ^ of_name) ^ high ^ step)
        return (mixed >> 16) & 0xFFFF

    def _elements(self, start: int, end: int, device: torch.device) -> Tensor:
        """Numbers of elements in the whole tensor, int64."""
        rest = torch.arange(start, end, device=device)
        element = torch.zeros_like(rest)
        for size, offset, stride in reversed(list(zip(self._shape, self._offset, self._strides, strict=True))):
            element += (rest % size + offset) * stride
            rest = rest // size
        return element


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers after which each bit depends on all: the one with constants 7feb352d and 846ca68b
    of Chris Wellons, "Prospecting for hash functions" (2018), whose bias is the least that he found for its form."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> by) & ((1 << (32 - by)) - 1)
