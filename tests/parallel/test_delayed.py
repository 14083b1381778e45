"""Collectives that end late, as they do on GPUs: what reads a result before it waits, or changes what is being sent,
computes something else. On CPUs each ends where it begins, so nothing else here would show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_dtensor.config.load import load, override
from moe_dtensor.parallel import collectives, lending
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.verify.miniature import Case, Layout, shrink
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.verdict import Verdict

DEBUG = load(Path(__file__).parents[2] / "train_configs" / "debug.toml")


@contextmanager
def delayed() -> Iterator[None]:
    """A result is NaN until it is waited for; what was sent has to be what it was until then."""
    right_call, right_finish = collectives._call, collectives.finish
    under_way: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def start(x: Tensor, kind: Any, collective: Any) -> Tensor:
        sent = x.contiguous()
        done = right_finish(right_call(sent, kind, collective), kind)
        if kind in ("local_slice", "identity") or not done.is_floating_point() or not done.numel():
            return done
        late = torch.full_like(done, torch.nan)
        # ``late`` is not kept: a result that nobody waits for leaves its place to another.
        under_way[late.data_ptr()] = done, sent, sent.clone()
        return late

    def finish(x: Tensor, kind: Any) -> Tensor:
        if x.numel() and x.data_ptr() in under_way:
            done, sent, as_sent = under_way.pop(x.data_ptr())
            assert torch.equal(sent, as_sent), f"what {kind} sends was changed before it was waited for"
            x.data.copy_(done)
        return x.view_as(x)

    late = {"start": start, "finish": finish}
    with mock.patch.multiple(collectives, **late), mock.patch.multiple(lending, **late):
        yield


@contextmanager
def read_before_it_is_there() -> Iterator[None]:
    def forward(ctx: Any, pending: Tensor, _gradient: Tensor, collective: Any) -> Tensor:
        ctx.collective = collective
        return pending.view_as(pending)

    with mock.patch.object(collectives._Wait, "forward", staticmethod(forward)):
        yield


@contextmanager
def gradient_read_before_it_is_there() -> Iterator[None]:
    def backward(_ctx: Any, _: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.view_as(grad), None

    with mock.patch.object(collectives._Start, "backward", staticmethod(backward)):
        yield


def verdict_of(layout: Layout, changes: dict[str, Any]) -> Verdict:
    (verdict,) = prove([Case(layout, shrink(override(DEBUG, changes), [layout]))])
    return verdict


CASES = {
    "tp": (Layout(1, 1, 2), {}),
    "tp by all-to-all": (Layout(1, 1, 2), {"mesh.dispatch": "all_to_all"}),
    "tp without sequence parallelism": (Layout(1, 1, 2), {"mesh.sequence_parallel": False}),
    "slices of experts, recomputed": (
        Layout(1, 1, 2),
        {"mesh.experts": "tp_hidden", "activation_checkpoint.mode": "full"},
    ),
    "dp by all-to-all": (Layout(2, 1, 1), {"mesh.experts": "dp", "mesh.dispatch": "all_to_all"}),
    "dp, experts lent": (
        Layout(2, 1, 1),
        {"mesh.experts": "dp", "mesh.lent_experts": 2, "moe.router": "zipf", "mesh.dispatch": "all_gather"},
    ),
    "dp and tp, a shared expert": (Layout(2, 1, 2), {"mesh.experts": "dp_tp", "moe.num_shared_experts": 1}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in ("tp", "dp by all-to-all") else pytest.mark.full) for name in CASES]
)
def test_nothing_is_read_before_it_is_waited_for(case: str) -> None:
    with delayed():
        verdict = verdict_of(*CASES[case])
    assert verdict.ok, (verdict.worst, verdict.failure)


@pytest.mark.parametrize("fault", [read_before_it_is_there, gradient_read_before_it_is_there])
def test_what_reads_too_early_is_caught(fault: Callable[[], Any]) -> None:
    """Both pass where a collective ends at once: a whole tree of tests on CPUs saw nothing."""
    with fault():
        assert verdict_of(*CASES["tp"]).ok
        with delayed():
            verdict = verdict_of(*CASES["tp"])
    assert not verdict.ok


def _changes_what_it_sends() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = torch.ones(4, 2)
    pending = collectives.start_all_gather(x, mesh, 0)
    x.mul_(2)
    pending()


def test_what_changes_what_is_sent_is_caught() -> None:
    run_on_ranks(_changes_what_it_sends, 2)
    with delayed(), pytest.raises(RuntimeError, match="what all_gather sends was changed"):
        run_on_ranks(_changes_what_it_sends, 2)
