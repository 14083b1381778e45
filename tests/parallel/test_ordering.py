"""The order that a compiled block is given, on graphs written by hand and on one that inductor made."""

from __future__ import annotations

import importlib
import itertools
import logging
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph, Node

from moe_dtensor.parallel.apply import can_order
from moe_dtensor.parallel.ordering import OrderForOverlap, order
from moe_dtensor.testing.ranks import run_on_ranks

MM, ADD = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
WAIT = torch.ops._c10d_functional.wait_tensor.default


class Written:
    """A graph whose nodes are called as they are named here."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.names: dict[Node, str] = {}

    def __call__(self, name: str, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        self.names[node] = name
        return node

    def gather(self, name: str, x: Node) -> Node:
        return self(name, GATHER, x, 2, "0")

    def pairs(self) -> list[tuple[str, str]]:
        self.graph.output(None)
        return [(self.names[before], self.names[after]) for before, after in order(self.graph)]

    def run(self) -> list[str]:
        """Kernels and collectives in their order; where each wait stands is checked apart."""
        chain = [(a, b) for a, b in self.pairs() if not b.startswith("wait")]
        assert all(b == c for (_, b), (c, _) in itertools.pairwise(chain))
        return [chain[0][0], *(b for _, b in chain)]


def test_a_collective_begins_as_soon_as_what_it_sends_is_there() -> None:
    new = Written()
    x = new.graph.placeholder("x")
    sent = new("sent", MM, x, x)
    new("work", MM, x, x)
    new("wait", WAIT, new.gather("gather", new("pointwise", ADD, sent, x)))
    assert new.run() == ["sent", "gather", "work"]


def test_what_it_does_not_send_gives_way() -> None:
    """Beside each collective one kernel, with what only needs it, and all that is left beside the last."""
    new = Written()
    x = new.graph.placeholder("x")
    weights = [new("weight 0", MM, x, x), new("rows", MM, x, x)]
    weights += [new("weight 1", MM, weights[1], x), new("weight 2", MM, x, x), new("weight 3", MM, x, x)]
    first = new("wait 1", WAIT, new.gather("gather 1", new("sent 1", MM, x, x)))
    second = new("wait 2", WAIT, new.gather("gather 2", new("sent 2", MM, first, x)))
    new("use", MM, second, weights[0])
    third = new("wait 3", WAIT, new.gather("gather 3", new("sent 3", MM, second, x)))
    new("use 3", MM, third, x)
    beside = [["weight 0"], ["rows", "weight 1"], ["weight 2", "weight 3", "use"]]
    assert new.run() == [
        *("sent 1", "gather 1", *beside[0], "sent 2", "gather 2", *beside[1], "sent 3", "gather 3", *beside[2]),
        "use 3",
    ]


def test_it_is_waited_for_where_it_is_needed() -> None:
    new = Written()
    x = new.graph.placeholder("x")
    come = new("wait", WAIT, new.gather("gather", x))
    new("work", MM, x, x)
    new("use", MM, new("pointwise", ADD, come, x), x)
    never = new("wait for nobody", WAIT, new.gather("gather 2", x))
    pairs = new.pairs()
    assert never in new.names
    assert ("work", "wait") in pairs
    assert ("use", "wait for nobody") in pairs


def test_collectives_keep_their_order() -> None:
    """All ranks must begin them alike, so none overtakes one that is not ready."""
    new = Written()
    x = new.graph.placeholder("x")
    new("wait 1", WAIT, new.gather("gather 1", new("sent", MM, x, x)))
    new("wait 2", WAIT, new.gather("gather 2", x))
    assert new.run() == ["sent", "gather 1", "gather 2"]


def test_what_is_under_way_when_the_graph_begins() -> None:
    """The other half of a graph that was broken in between."""
    new = Written()
    new("use", MM, new("wait", WAIT, new.graph.placeholder("coming")), new.graph.placeholder("x"))
    assert new.pairs() == []


def test_without_collectives_nothing_is_ordered() -> None:
    new = Written()
    x = new.graph.placeholder("x")
    new("b", MM, new("a", MM, x, x), x)
    assert new.pairs() == []


def _gather_between_products(x: Tensor, w: Tensor, group: str) -> tuple[Tensor, Tensor]:
    sent = x @ w
    beside = w @ w
    gathered = GATHER(sent, 2, group)
    return WAIT(gathered) @ w, beside


def _compiled_on_rank() -> tuple[list[str], list[str], bool]:
    """What inductor's code calls, in order, without the pass and with it; whether the numbers are eager's."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    x, w = torch.randn(4, 4), torch.randn(4, 4)
    group = dist.group.WORLD.group_name
    eager = _gather_between_products(x, w, group)
    calls = []
    equal = True
    for order_pass in (None, OrderForOverlap()):
        torch._dynamo.reset()
        # Only products and collectives: nothing for a C++ compiler, which would take most of the time.
        with config.patch(post_grad_custom_post_pass=order_pass, reorder_for_locality=False, fx_graph_cache=False):
            out, code = run_and_get_code(torch.compile(_gather_between_products), x, w, group)
        equal = equal and all(torch.equal(a, b) for a, b in zip(out, eager, strict=True))
        calls.append(re.findall(r"[._](mm|all_gather_into_tensor\w*|wait_tensor)(?:\.default)?\(", code[-1]))
    return calls[0], calls[1], equal


@pytest.mark.filterwarnings("ignore")  # what torch itself imports to compile
def test_inductor_keeps_the_order_that_its_graph_is_given() -> None:
    importlib.import_module("torch._inductor.compile_fx")  # once, before the ranks are forked
    for before, after, equal in run_on_ranks(_compiled_on_rank, 2, timeout=300):
        kinds = [[name.split("_")[0] for name in calls] for calls in (before, after)]
        assert kinds[0] == ["mm", "mm", "all", "wait", "mm"], "without the pass nothing runs beside the collective"
        assert kinds[1] == ["mm", "all", "mm", "wait", "mm"]
        assert equal


def test_with_an_untested_torch_the_pass_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert can_order("2.13.1+cu130")
        assert not caplog.messages
        assert not can_order("2.99.0")
    assert caplog.messages == ["compile.order is off: it was tested with torch 2.11 and 2.13, not with 2.99.0"]
