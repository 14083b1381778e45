"""Work that one rank does for all: file systems may show other ranks an older view of a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_rank_0(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Result of ``work()`` of rank 0, on every rank; what it raises is raised on every rank.

    Args:
        work: called on rank 0 only; result and exception travel by pickle.
        group: of all ranks; the default group if None. Without process groups ``work`` is just called.
    """
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # raised below, here and on the ranks that wait for it
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
