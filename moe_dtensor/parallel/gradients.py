"""The global gradient norm over dp, tp and pp, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def global_norm(parts: Sequence[nn.Module], mesh: DeviceMesh, norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients of the model, the same scalar on every rank. No host sync.

    Each parameter counts once, however many ranks hold it.

    Raises:
        RuntimeError: a parameter has no gradient (a schedule that lost it, or a layer that took no part).
    """
    grads = []
    for part in parts:
        for name, param in part.named_parameters():
            if param.grad is None:
                raise RuntimeError(f"Parameter {name} has no gradient after the backward pass.")
            grads.append(param.grad)
    norm = torch.nn.utils.get_total_norm(grads, norm_type)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.to(device)
    pp = mesh["pp"]
    if pp.size() == 1:
        return norm
    if math.isinf(norm_type):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=pp.get_group())
        return norm
    norm = norm**norm_type
    dist.all_reduce(norm, group=pp.get_group())
    return norm ** (1.0 / norm_type)


@torch.no_grad()
def clip(parts: Sequence[nn.Module], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most ``max_norm``, given their norm. 0 leaves them."""
    if max_norm == 0:
        return
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part.parameters(), max_norm, norm.to(next(part.parameters()).device))
