"""How ranks that share experts reach each other's memory (``mesh.dispatch = one_sided``).

On GPUs of one host by addresses in each other's memory; on CPUs, where a proof needs no speed, by collectives.
"""

from __future__ import annotations

import os

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.kernels.experts.exchange import PEERS
from moe_dtensor.kernels.experts.permute import permute, unpermute
from moe_dtensor.kernels.library import triton_kernels
from moe_dtensor.parallel import collectives


def install_peers(axis: DeviceMesh) -> str:
    """Make the ranks of an axis known to the kernels; the name of their group."""
    name = axis.get_group().group_name
    if name not in PEERS:
        PEERS[name] = CollectivePeers(axis) if axis.device_type == "cpu" else SymmetricPeers(axis)
    return name


class CollectivePeers:
    """All-gather and reduce-scatter, apart from the kernels."""

    def __init__(self, axis: DeviceMesh) -> None:
        self.ranks = axis.size()
        self.axis = collectives.describe(axis, "all_gather", "reduce_scatter")

    def gather_permute(self, x_TD: Tensor, position_SK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """See :data:`moe_dtensor.kernels.experts.exchange.gather_permute`."""
        all_SD = collectives.run(x_TD, "all_gather", self.axis)
        return permute(all_SD, position_SK, rows), all_SD

    def unpermute_scatter(self, y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None) -> Tensor:
        """See :data:`moe_dtensor.kernels.experts.exchange.unpermute_scatter`."""
        return collectives.run(unpermute(y_ND, position_SK, gate_SK), "reduce_scatter", self.axis)


class SymmetricPeers:
    """Memory of each rank that the others have mapped: room for its tokens, and for what each rank sends it.

    Nothing here waits for the host, and all runs on one stream. A barrier of the devices parts writing from reading.
    Calls to gather and to scatter alternate, so the barrier of one says that the memory of the other has been read; of
    two alike in a row the second begins with a barrier more.
    """

    def __init__(self, axis: DeviceMesh) -> None:
        self.group, self.ranks, self.rank = axis.get_group().group_name, axis.size(), axis.get_local_rank()
        self.room, self.last = 0, ""

    def gather_permute(self, x_TD: Tensor, position_SK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """See :data:`moe_dtensor.kernels.experts.exchange.gather_permute`."""
        all_SD, out_ND = x_TD.new_empty(position_SK.shape[0], x_TD.shape[1]), x_TD.new_empty(rows, x_TD.shape[1])
        self._begin("gather", x_TD)
        self.memory[: x_TD.nbytes].view(x_TD.dtype).view_as(x_TD).copy_(x_TD)
        self.handle.barrier(channel=0)
        triton_kernels("experts.exchange").gather_permute(self.sent_R, position_SK, all_SD, out_ND)
        return out_ND, all_SD

    def unpermute_scatter(self, y_ND: Tensor, position_SK: Tensor, gate_SK: Tensor | None) -> Tensor:
        """See :data:`moe_dtensor.kernels.experts.exchange.unpermute_scatter`."""
        out_TD = y_ND.new_empty(position_SK.shape[0] // self.ranks, y_ND.shape[1])
        self._begin("scatter", out_TD)
        kernels = triton_kernels("experts.exchange")
        kernels.unpermute_scatter(y_ND.contiguous(), position_SK, gate_SK, self.received_R, self.rank)
        self.handle.barrier(channel=0)
        received = self.memory[self.room : self.room + self.ranks * out_TD.nbytes].view(out_TD.dtype)
        kernels.sum_ranks(received.view(self.ranks, *out_TD.shape), out_TD)
        return out_TD

    def _begin(self, kind: str, tokens_TD: Tensor) -> None:
        if tokens_TD.nbytes > self.room:
            self._make_room(tokens_TD)
        elif kind == self.last:
            self.handle.barrier(channel=0)
        self.last = kind

    def _make_room(self, tokens_TD: Tensor) -> None:
        # Nobody may still use what is given back here: all ranks come here together.
        torch.cuda.synchronize()
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        room = -(-tokens_TD.nbytes // 256) * 256
        try:
            symmetric_memory.enable_symm_mem_for_group(self.group)
            self.memory = symmetric_memory.empty((1 + self.ranks) * room, dtype=torch.uint8, device=tokens_TD.device)
            self.handle = symmetric_memory.rendezvous(self.memory, self.group)
        except RuntimeError as error:
            raise ConfigError(
                f"mesh.dispatch = one_sided: the ranks that share experts cannot map each other's memory ({error}).",
                "Place them on one host whose GPUs reach each other, or set mesh.dispatch = all_gather.",
            ) from error
        self.room = room
        addresses = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64)
        self.sent_R, self.received_R = (x.to(tokens_TD.device) for x in (addresses, addresses + room))
        self.handle.barrier(channel=0)
