"""CUDA graphs: kernels recorded once and launched again as one. For small models and small microbatches, whose kernels
run for less time than the host takes to launch them one by one.

B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.model.transformer import Told, Transformer
from moe_dtensor.parallel import fsdp
from moe_dtensor.parallel.accumulation import Accumulation, split
from moe_dtensor.parallel.gradients import local_part

Run = Callable[..., tuple[Tensor, Told]]

WARM_UP = 2
"""Calls that run as they are: kernels are chosen and compiled in them."""


class Graphed:
    """A function whose tensors' shapes and addresses never change, replayed as a CUDA graph from its third call.

    Args:
        function: of tensors (or None), to tensors in whatever structure. It reads and writes the same memory whenever
            it is called, and never asks the device for a value.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor | None) -> Any:
        """The function's output, in memory of its own."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function(*arguments)
        if self.graph is None:
            self.arguments, graph = tree_map_only(Tensor, torch.clone, arguments), torch.cuda.CUDAGraph()
            # Other threads of this process (collectives, data) may go on with what a capture forbids.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = self.function(*self.arguments)
            self.graph = graph
        for held, given in zip(self.arguments, arguments, strict=True):
            if held is not None:
                held.copy_(given)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.output)

    def release(self) -> None:
        """Destroy the graph: a communicator of NCCL ends only after all graphs that hold its collectives."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None
            del self.arguments, self.output


def peak_memory(device: torch.device, config: Config) -> int:
    """Bytes of tensors on a GPU at the peak since torch's statistics were reset, those among them that exist only while
    a graph is replayed and that torch takes for free."""
    if not config.compile.cuda_graph:
        return torch.cuda.max_memory_allocated(device)
    inside = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == (device.index or 0) and segment["segment_pool_id"] != (0, 0)
    )
    # A step in which a graph was captured has had the same tensors outside of it.
    return min(torch.cuda.max_memory_allocated(device) + inside, torch.cuda.max_memory_reserved(device))


class GraphedAccumulation(Accumulation):
    """pp = 1: forward and backward of each microbatch as one CUDA graph; on CPUs the same without the graph.

    What a graph reads and writes has to stay where it is. So gathered weights and the sums of gradients keep their
    memory for the whole run, and what FSDP does once a step it does around the microbatches: it gathers all weights
    before the first and reduces all gradients after the last.

    Args:
        part: the whole model, under FSDP, whose weights stay gathered after a forward pass.
        config: resolved.
        device: of this rank.
    """

    def __init__(self, part: Transformer, config: Config, device: torch.device) -> None:
        super().__init__(part, config)
        self.sums: list[fsdp.GradientSum] = []
        self.run: Run = self._microbatch
        self.ready: torch.Event | None = None
        if device.type == "cuda":
            self.run = Graphed(self._microbatch)
            self.ready = torch.cuda.current_stream(device).record_event()
        fsdp.stay_in_place(part)

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward; the summed loss times ``scale``, a scalar."""
        run = self._microbatch  # in the first step FSDP gathers by itself, and sums get their memory
        if self.sums:
            run = self._refusing
            fsdp.gather(self.part)
            for held in self.sums:
                setattr(held.owner, held.attribute, held.tensor)
            torch._foreach_zero_([local_part(held.tensor) for held in self.sums])
        fsdp.only_accumulate(self.part)
        losses = []
        for arguments in split(batch, self.config.training.microbatch_size):
            loss, told = run(*arguments, scale)
            self.part.add_told(told)
            losses.append(loss)
        self.sums = self.sums or fsdp.gradient_sums(self.part)
        fsdp.reduce_at_end(self.part)
        return torch.stack(losses).sum()

    def close(self) -> None:
        """Destroy the graph, which may hold collectives."""
        if isinstance(self.run, Graphed):
            self.run.release()

    def without_graph(self) -> None:
        """From here on run microbatches as they are: something in the model does another thing each time."""
        self.run = self._microbatch

    def _microbatch(self, *arguments: Tensor | None) -> tuple[Tensor, Told]:
        *inputs, scale = arguments
        before = self.part.take_told()
        if self.ready is not None:
            # FSDP's own streams, which have nothing to do here, are not to wait for one that is being recorded.
            self.part.set_post_optim_event(self.ready)  # type: ignore[operator]
        loss = self.part(*inputs).sum() * scale
        loss.backward()
        told = self.part.take_told()
        self.part.add_told(before)
        return loss.detach(), told

    def _refusing(self, *arguments: Tensor | None) -> tuple[Tensor, Told]:
        try:
            return self.run(*arguments)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise ConfigError(
                "compile.cuda_graph = true, but something in this model waits for the GPU: "
                + str(error).splitlines()[0],
                "Set compile.cuda_graph = false.",
            ) from error
