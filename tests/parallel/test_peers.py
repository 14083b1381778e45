"""One-sided dispatch: on CPU ranks, beside all-gather; and in which order ranks of a GPU touch shared memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dtensor.kernels.experts.exchange import PEERS
from moe_dtensor.parallel import peers
from moe_dtensor.testing.ranks import run_on_ranks
from tests.parallel.test_dispatch import FLOAT32, ROUTES, dispatched, gathered, inputs, on, start

PLACED = [
    on("2x1x2"),
    on("2x1x2", mesh__experts="dp"),
    on("4x1x1", mesh__experts="dp", mesh__expert_ranks=2),
]


def _results(keys: dict[str, Any], route: str) -> tuple[list[Tensor], int]:
    """Output and gradients of vectors, gates and weights; and how often peers were asked for."""
    trainer = start(keys | FLOAT32 | {"moe.backend": "torch", "moe.hidden_dim": 16})
    calls = count_calls()
    moe, (x, gate, expert) = gathered(trainer), inputs(trainer, route)
    x, gate = x.detach().float().requires_grad_(), gate.detach().float().requires_grad_()
    y = dispatched(moe, x, gate, expert)
    weights = [moe.experts.w_up, moe.experts.w_down]
    gradients = torch.autograd.grad(y.square().sum(), (x, gate, *weights))
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    return [y.detach(), *local], len(calls)


def count_calls() -> list[str]:
    calls: list[str] = []

    def count(kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            calls.append(kind)
            return run(*inputs)

        return counted

    for each in PEERS.values():
        for kind in ("gather_permute", "unpermute_scatter"):
            setattr(each, kind, count(kind, getattr(type(each), kind).__get__(each)))
    return calls


def _compare() -> list[float]:
    found = []
    for keys in PLACED:
        for route in ROUTES:
            want, none = _results(keys, route)
            got, calls = _results(keys | {"mesh.dispatch": "one_sided"}, route)
            assert (none, calls) == (0, 4), f"{keys}: forward and back a gather and a scatter, not {calls}"
            assert want[0].abs().max() > 1e-4, "nothing was computed"
            found += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)]
    return found


def test_one_sided_computes_what_all_gather_does() -> None:
    """Outputs and gradients of vectors, gates and weights; over tp, over dp, and in groups of dp ranks."""
    for rank in run_on_ranks(_compare, 4, timeout=600):
        assert max(rank) < 1e-6


class Memory:
    """In place of symmetric memory and its kernels: what is done with it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.buffer_ptrs = [0, 0]
        kernels = SimpleNamespace(
            gather_permute=lambda *_: self.events.append("read"),
            unpermute_scatter=lambda *_: self.events.append("write"),
            sum_ranks=lambda *_: self.events.append("sum"),
        )
        monkeypatch.setattr(peers, "triton_kernels", lambda _: kernels)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        for name in ("enable_symm_mem_for_group", "empty", "rendezvous"):
            monkeypatch.setattr(peers.symmetric_memory, name, getattr(self, name))

    def enable_symm_mem_for_group(self, group: str) -> None:
        pass

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.events.append(f"room {size}")
        return torch.empty(size, dtype=dtype)

    def rendezvous(self, memory: Tensor, group: str) -> Memory:
        return self

    def barrier(self, channel: int) -> None:
        self.events.append("barrier")


def of_two_ranks() -> peers.SymmetricPeers:
    group = SimpleNamespace(group_name="two")
    return peers.SymmetricPeers(SimpleNamespace(get_group=lambda: group, size=lambda: 2, get_local_rank=lambda: 0))


def test_no_memory_is_written_before_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather and scatter in turn take one barrier each: that of one says that the other has been read everywhere.

    Of two alike in a row, as where no gradient of the tokens is asked for, the second waits before it writes.
    """
    memory, two = Memory(monkeypatch), of_two_ranks()
    x_TD, position_SK = torch.zeros(4, 16), torch.zeros(8, 2, dtype=torch.int32)
    room = ["room 768", "barrier"]

    def gather() -> None:
        two.gather_permute(x_TD, position_SK, 8)

    def scatter() -> None:
        two.unpermute_scatter(torch.zeros(8, 16), position_SK, None)

    for call in (gather, scatter, gather, scatter):
        call()
    assert memory.events == room + ["barrier", "read", "write", "barrier", "sum"] * 2
    memory.events.clear()
    for call in (gather, gather, scatter, scatter):
        call()
    in_turn = ["barrier", "read"]
    sent = ["write", "barrier", "sum"]
    assert memory.events == [*in_turn, "barrier", *in_turn, *sent, "barrier", *sent]


def test_more_tokens_take_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, two = Memory(monkeypatch), of_two_ranks()
    for tokens in (4, 2, 8):
        two.gather_permute(torch.zeros(tokens, 16), torch.zeros(2 * tokens, 2, dtype=torch.int32), 8)
    assert [event for event in memory.events if event.startswith("room")] == ["room 768", "room 1536"]


def test_memory_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of two hosts, or GPUs that do not reach each other: told, with the way out."""
    memory, two = Memory(monkeypatch), of_two_ranks()

    def fail(*_: Any) -> None:
        raise RuntimeError("no peer access")

    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", fail)
    with pytest.raises(peers.ConfigError, match=r"no peer access.*\n.*all_gather"):
        two.gather_permute(torch.zeros(4, 16), torch.zeros(8, 2, dtype=torch.int32), 8)
    assert memory.events
