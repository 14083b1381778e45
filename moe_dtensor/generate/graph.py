"""A step that the host launches once: a CUDA graph. B sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2
"""Steps that run as they are: kernels are chosen and compiled in them."""


class Graphed:
    """A function of one tensor whose shapes and addresses never change, replayed as a CUDA graph from its third call.

    A step of one token is a few hundred kernels of some microseconds each: launched one by one, the host is what takes
    the time.

    Args:
        function: reads and writes the same memory whenever it is called, and never asks the device for a value.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The function's output, in memory of its own."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function(x)
        if self.graph is None:
            self.input, self.graph = x.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.function(self.input)
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()
