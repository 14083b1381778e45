"""The global gradient norm over dp, tp and pp, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def global_norm(parts: Sequence[nn.Module], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients of the model, the same scalar on every rank. One collective, no host sync.

    Computed and summed in float32 at least, whatever dtype the gradients have.

    Each parameter counts once, however many ranks hold it.

    Raises:
        RuntimeError: a parameter has no gradient (a schedule that lost it, or a layer that took no part).
    """
    by_copies: dict[int, list[Tensor]] = {}
    for part in parts:
        for name, param in part.named_parameters():
            if param.grad is None:
                raise RuntimeError(f"Parameter {name} has no gradient after the backward pass.")
            local = local_part(param.grad)
            if local.numel():
                by_copies.setdefault(_copies(param.grad), []).append(local)
    if math.isinf(norm_type):
        largest = [n for grads in by_copies.values() for n in _norms(grads, norm_type)]
        # A collective's maximum may lose a NaN on some ranks and keep it on others.
        norm = torch.stack(largest).max().nan_to_num(nan=math.inf, posinf=math.inf).to(device)
        dist.all_reduce(norm, dist.ReduceOp.MAX)
        return norm
    # Each copy adds its share, so that one sum over all ranks serves dp, tp and pp alike.
    shares = [
        torch.stack(_norms(grads, norm_type)).pow(norm_type).sum() / copies for copies, grads in by_copies.items()
    ]
    total = torch.stack(shares).sum().to(device)
    dist.all_reduce(total)
    return total ** (1.0 / norm_type)


def _norms(grads: list[Tensor], norm_type: float) -> tuple[Tensor, ...]:
    return torch._foreach_norm(grads, norm_type, dtype=torch.promote_types(grads[0].dtype, torch.float32))


@torch.no_grad()
def clip(parts: Sequence[nn.Module], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most ``max_norm``, given their norm. 0 leaves them."""
    if max_norm == 0:
        return
    for part in parts:
        grads = [local_part(param.grad) for param in part.parameters() if param.grad is not None]
        # As torch's: the norm of a clipped gradient is a hair below the limit, and a zero norm divides nothing.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(grads[0].device)
        torch._foreach_mul_(grads, factor)


def local_part(x: Tensor) -> Tensor:
    """What this rank holds. Plain tensors, not DTensors: a list of those takes the host milliseconds to place."""
    return x.to_local() if isinstance(x, DTensor) else x


def _copies(grad: Tensor) -> int:
    """Ranks of a stage that hold the same part."""
    if not isinstance(grad, DTensor):
        return 1
    return math.prod(grad.device_mesh.size(i) for i, place in enumerate(grad.placements) if place.is_replicate())
