"""The two sides of a layer whose work is split over one mesh axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.schema import Config
from moe_dtensor.parallel import collectives
from moe_dtensor.parallel.collectives import Coming


class Borders:
    """All-gather in and reduce-scatter out, or, where every rank holds all tokens, nothing in and all-reduce out.

    Args:
        axis: one mesh axis.
        dim: dimension of what crosses the border that the axis splits outside of the layer; None: every rank holds it.
    """

    def __init__(self, axis: DeviceMesh, dim: int | None) -> None:
        self.axis = axis
        self.dim = dim

    def enter(self, x: Tensor) -> Coming:
        """All tokens, for a share of the work."""
        if self.dim is None:
            return collectives.start_copy(x, self.axis)
        return collectives.start_gather(x, self.axis, self.dim)

    def enter_data(self, x: Tensor) -> Coming:
        """The same without gradient."""
        with torch.no_grad():
            return (lambda: x) if self.dim is None else collectives.start_gather_alike(x, self.axis, self.dim)

    def leave(self, y: Tensor) -> Coming:
        """Sum the shares, back to how the stream is held."""
        if self.dim is None:
            return collectives.start_reduce(y, self.axis)
        return collectives.start_reduce_scatter(y, self.axis, self.dim)

    def enter_before(self, module: nn.Module) -> None:
        """Put the first border before a module whose first argument is the stream."""
        module.register_forward_pre_hook(lambda _module, args: (self.enter(args[0])(), *args[1:]))

    def wrap(self, module: nn.Module) -> None:
        """Put both borders around a module whose first argument and output are the stream."""
        self.enter_before(module)
        module.register_forward_hook(lambda _module, _args, y: self.leave(y)())


def position_borders(config: Config, tp: DeviceMesh) -> Borders:
    """Of layers that take whole sequences in order: under sequence parallelism tp splits their positions."""
    return Borders(tp, 1 if config.mesh.sequence_parallel else None)


def token_borders(config: Config, tp: DeviceMesh) -> Borders:
    """Of layers that take tokens in any order: the ranks' come one after the other, and nothing is rearranged."""
    return Borders(tp, 0 if config.mesh.sequence_parallel else None)
