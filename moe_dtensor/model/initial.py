"""Initial values: the same full tensors for every mesh and pipeline split.

Each tensor (each expert's slice, for stacked weights) is drawn from its own generator, seeded by the
run's seed and its name, and every rank keeps its part. So no value depends on how many ranks there are,
and no rank draws experts that it does not hold. Large tensors are drawn in blocks of rows, by the ranks that hold any.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dtensor.config.schema import Config

OUTPUT_PROJECTIONS = ("wo.weight", "down.weight", "w_down")
LARGE = 1 << 27
"""Elements (512 MiB in float32) above which a tensor is drawn in blocks."""
BLOCK = 1 << 24
"""Elements of a block."""


@torch.no_grad()
def init_weights(part: nn.Module, config: Config) -> None:
    """Fill the parameters of a model or a pipeline stage.

    Normal values of standard deviation ``init_std``; projections back into the residual stream are
    divided by sqrt(2 x layers), as in GPT-2 (Radford et al., 2019); norms are 1, biases and sinks 0.
    """
    for name, param in part.named_parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        if local.numel() == 0:
            continue
        if name.endswith(("bias", "sinks")):
            local.zero_()
            continue
        if "norm" in name:
            local.fill_(1.0)
            continue
        std = config.model.init_std
        if name.endswith(OUTPUT_PROJECTIONS):
            std /= math.sqrt(2 * config.model.num_layers)
        _fill_normal(local, held_slices(param), tuple(param.shape), std, f"{config.training.seed}/{name}")


def _fill_normal(local: Tensor, held: tuple[slice, ...], shape: tuple[int, ...], std: float, key: str) -> None:
    """Write the held slices of the full normal tensor called ``key`` into ``local``."""
    if ".experts." in key:
        for row, expert in zip(local, range(shape[0])[held[0]], strict=True):
            row.copy_(_normal(shape[1:], std, f"{key}/{expert}", local.device)[held[1:]])
    elif math.prod(shape) > LARGE:
        _fill_by_rows(local, held, shape, std, key)
    else:
        local.copy_(_normal(shape, std, key, local.device)[held])


def _fill_by_rows(local: Tensor, held: tuple[slice, ...], shape: tuple[int, ...], std: float, key: str) -> None:
    """The same of a tensor in blocks of rows, each with a generator of its own; only blocks that ``held`` reaches."""
    rows = max(1, BLOCK // math.prod(shape[1:]))
    wanted = held[0]
    for first in range(wanted.start // rows * rows, wanted.stop, rows):
        last = min(first + rows, shape[0])
        block = _normal((last - first, *shape[1:]), std, f"{key}/rows {first}", local.device)
        start, stop = max(first, wanted.start), min(last, wanted.stop)
        local[start - wanted.start : stop - wanted.start] = block[start - first : stop - first][:, *held[1:]]


def _normal(shape: tuple[int, ...], std: float, key: str, device: torch.device) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator(device=device).manual_seed(seed)
    # Drawn in float32 whatever the dtype: a float64 proof then starts from the values that a float32 run has.
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def held_slices(param: Tensor) -> tuple[slice, ...]:
    """The part of the full tensor that this rank holds."""
    if not isinstance(param, DTensor):
        return tuple(slice(0, size) for size in param.shape)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
