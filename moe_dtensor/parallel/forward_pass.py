"""Forward only, over pipeline stages: what evaluation runs whatever the schedule of training is.

A schedule of torch's carries state from forward to backward, and sets its stages up anew when it goes from one mode to
the other. Here nothing is kept between two calls. M microbatches, S stages.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import num_stages, rank_stages, stream_width
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer

Arguments = tuple[Tensor | None, ...]
"""Of the model for one microbatch: tokens, labels, positions, documents, None, sequence numbers."""


def stream_shape(config: Config) -> tuple[int, int, int]:
    """What travels between stages: ``(B, S held, D)`` of a microbatch, wider with multi-token prediction."""
    training = config.training
    length = training.seq_len // (config.mesh.tp if config.mesh.sequence_parallel else 1)
    return training.microbatch_size, length, stream_width(config)


class ForwardPass:
    """Microbatch m passes stage s at tick m + s, so that after S ticks every stage is at work.

    In a tick each rank first runs its stages, then exchanges what goes on to the next, in one batch. Both ends of a
    transfer are in the batch of the same tick, whatever the order of stages on ranks: none waits for a later one.

    Args:
        parts: this rank's stages.
        config: resolved.
        mesh: (dp, pp, tp).
        device: of this rank.
    """

    def __init__(self, parts: list[Transformer], config: Config, mesh: DeviceMesh, device: torch.device) -> None:
        self.parts = dict(zip(rank_stages(config, mesh["pp"].get_local_rank()), parts, strict=True))
        self.count = num_stages(config)
        self.group = mesh["pp"].get_group()
        self.here = mesh["pp"].get_local_rank()
        self.rank_of = {stage: rank for rank in range(config.mesh.pp) for stage in rank_stages(config, rank)}
        self.shape = stream_shape(config)
        self.dtype = getattr(torch, config.training.param_dtype)
        self.device = device

    @torch.no_grad()
    def __call__(self, microbatches: list[Arguments]) -> Tensor:
        """The loss summed over all targets; 0 on ranks without the last stage."""
        # NCCL makes a group's communicator when all of its ranks meet; a transfer is between two of them.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        arrived: dict[int, Tensor] = {}
        for tick in range(len(microbatches) + self.count - 1):
            left: dict[int, Tensor] = {}
            for stage, part in self.parts.items():
                if 0 <= tick - stage < len(microbatches):
                    tokens, labels, positions, documents, _, sequence = microbatches[tick - stage]
                    x = tokens if part.is_first else arrived[stage]
                    left[stage] = part(x, labels, positions, documents, tokens, sequence)
                    if part.is_last:
                        total += left[stage].sum()
            arrived = self._pass_on(left, [s for s in range(self.count - 1) if 0 <= tick - s < len(microbatches)])
        return total

    def _pass_on(self, left: dict[int, Tensor], stages: list[int]) -> dict[int, Tensor]:
        """Send on what this rank's ``stages`` put out; what arrives here, by the stage that takes it."""
        arrived, transfers = {}, []
        for stage in stages:
            sender, receiver = self.rank_of[stage], self.rank_of[stage + 1]
            if sender == receiver == self.here:
                arrived[stage + 1] = left[stage]
            elif sender == self.here:
                transfers.append(self._transfer(dist.isend, left[stage].contiguous(), receiver))
            elif receiver == self.here:
                arrived[stage + 1] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                transfers.append(self._transfer(dist.irecv, arrived[stage + 1], sender))
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return arrived

    def _transfer(self, op: object, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, x, group=self.group, group_peer=peer)  # type: ignore[arg-type]
