"""Counting what a rank sends: each collective by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.mesh import build_mesh
from moe_dtensor.parallel import collectives
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.testing.ranks import run_on_ranks

Sent = tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]


def _by_hand() -> Sent:
    """2 x 2 ranks, float64 rows of 10."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "pp", "tp"))
    dp, tp, flat = mesh["dp"], mesh["tp"], mesh["dp", "tp"]._flatten("dp_tp")
    x = torch.ones(4, 10, dtype=torch.float64, requires_grad=True)
    with BytesSent(mesh) as sent:
        collectives.start_all_gather(x, tp, 0)().sum().backward()
        collectives.start_all_reduce(x, dp)()
        # This rank keeps its own part: three rows of four leave it, and come back.
        counts = [1] * 4
        collectives.all_to_all(x, flat, counts, counts).sum().backward()
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 0:
            dist.isend(x.detach(), 3).wait()
        elif dist.get_rank() == 3:
            dist.irecv(torch.empty(4, 10, dtype=torch.float64), 0).wait()
    return sent.by_collective(), dict(sent.calls)


def test_each_collective_counts_what_it_sends() -> None:
    row, ranks = 80, run_on_ranks(_by_hand, 4)
    expected = {
        ("tp", "all_gather"): (4 * row, 1),
        ("tp", "reduce_scatter"): (4 * row, 1),  # backward: of eight rows, those of the other
        ("dp", "all_reduce"): (4 * row, 1),
        ("dp_tp", "all_to_all"): (2 * 3 * row, 2),
        ("dp_tp", "all_reduce"): (6, 1),  # all ranks: the default group is that axis
    }
    for rank, (sent, calls) in enumerate(ranks):
        more = {("dp_tp", "send"): (4 * row, 1)} if rank == 0 else {}
        assert {key: (sent[key], calls[key]) for key in calls} == expected | more


def _one_rank() -> Sent:
    mesh = build_mesh(resolve(Config(), 1), torch.device("cpu"))
    with BytesSent(mesh) as sent:
        dist.all_reduce(torch.ones(1))
    return sent.by_collective(), dict(sent.calls)


def test_one_rank_sends_nothing() -> None:
    assert run_on_ranks(_one_rank, 1) == [({}, {})]
