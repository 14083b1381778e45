"""Sort copies of tokens by expert: where each copy goes, and where each expert's rows end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_dtensor.kernels.library import define, launches_triton, triton_kernels


class Route(NamedTuple):
    """The copies held here, as rows sorted by expert (stable: within an expert in the order of the tokens)."""

    position: Tensor
    """``(T, K)`` int32: the row of each copy; -1 for copies of experts held elsewhere."""
    copy: Tensor
    """``(N,)`` int32: the copy ``t * K + k`` in each row. Rows past ``ends[-1]`` hold nothing: do not read them."""
    ends: Tensor
    """``(E,)`` int32: the row after the last of each expert."""


def sort_by_expert(expert_TK: Tensor, first_expert: int, num_experts: int) -> Route:
    """Counting sort of copies by expert, without a host sync.

    Args:
        expert_TK: global ids ``(T, K)``, int64.
        first_expert: id of the first expert held here.
        num_experts: experts held here; other ids get no row.
    """
    return Route(*_sort_by_expert(expert_TK, first_expert, num_experts))


def count_rows(route: Route, rows: str | int, num_experts: int, all_held: bool) -> int:
    """How many rows to allocate: a number of ``rows`` as it is, else T * K if every expert is held, else by ``rows``.

    ``exact`` is one host sync; ``worst`` is T * min(K, E).
    """
    if not isinstance(rows, str):
        return rows
    tokens, choices = route.position.shape
    if all_held:
        return tokens * choices
    if rows == "worst":
        return tokens * min(choices, num_experts)
    return int(route.ends[-1])


def _run(expert_TK: Tensor, first_expert: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if launches_triton(expert_TK) and expert_TK.numel() > 0:
        return triton_kernels("experts.sort").sort_by_expert(expert_TK.contiguous(), first_expert, num_experts)
    key_N = expert_TK.flatten() - first_expert
    held_N = (key_N >= 0) & (key_N < num_experts)
    sorted_N, copy_N = key_N.where(held_N, num_experts).sort(stable=True)
    ids_E = torch.arange(num_experts, device=key_N.device)
    ends_E = torch.searchsorted(sorted_N, ids_E, right=True, out_int32=True)
    row_N = torch.arange(copy_N.numel(), device=key_N.device)
    position_N = torch.empty_like(copy_N).scatter_(0, copy_N, row_N).where(held_N, -1)
    return position_N.view_as(expert_TK).int(), copy_N.int(), ends_E


def _fake(expert_TK: Tensor, first_expert: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    position_TK = torch.empty_like(expert_TK, dtype=torch.int32, memory_format=torch.contiguous_format)
    return position_TK, position_TK.new_empty(expert_TK.numel()), position_TK.new_empty(num_experts)


_sort_by_expert = define(
    "sort_by_expert(Tensor expert, int first_expert, int num_experts) -> (Tensor, Tensor, Tensor)", _run, _fake
)
