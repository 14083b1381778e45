"""The order in which a compiled block computes and communicates.

The compiler takes what does not depend on each other in any order, joins kernels of runs that should follow one
another, and puts what begins a collective beside what waits for it. This pass over its graph gives it the order that
the layers were written in, with three changes: a collective begins as soon as what it sends is there, it is waited for
where what it brings is needed, and what the next collective does not send (a weight's gradient) gives way, to run
beside it and those after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from itertools import pairwise
from operator import getitem

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch._inductor.fx_utils import get_fake_args_kwargs
from torch._inductor.virtualized import V
from torch.fx import Graph, Node
from torch.utils._ordered_set import OrderedSet

KERNELS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product",
    "aten::_grouped_mm",
    "moe_dtensor::",
    "symm_mem::",
)
"""How the names of operators begin that are kernels of their own, to be kept in order. The compiler places what it
makes kernels of between them."""


class OrderForOverlap(CustomGraphPass):
    """Makes :func:`order` one of dependencies, in a graph that has collectives."""

    def __call__(self, graph: Graph) -> None:
        """In place."""
        _describe(graph)
        preserve_node_ordering(graph, {later: OrderedSet([_tensor_of(before)]) for before, later in order(graph)})

    def uuid(self) -> bytes:
        """For the compiler's cache."""
        return get_hash_for_files((__file__,))


def order(graph: Graph) -> list[tuple[Node, Node]]:
    """Pairs of nodes of which the second comes after the first; none in a graph without collectives."""
    work = [node for node in graph.nodes if _is_start(node) or _named(node, KERNELS)]
    waits = [node for node in graph.nodes if _is_wait(node)]
    if not waits:
        return []
    needs = _needs(graph, {*work, *waits})
    run = _starts_early(work, needs)
    place = {node: i for i, node in enumerate(run)}
    pairs = list(pairwise(run))
    for wait in waits:
        use = min((place[node] for node in run if wait in needs[node]), default=len(run))
        pairs += [(run[use - 1], wait)] if use > 0 else []
    return pairs


def _needs(graph: Graph, marked: Set[Node]) -> dict[Node, set[Node]]:
    """The marked nodes that each node takes its inputs from, if only through others; through a wait, its start too."""
    needs: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        needs[node] = set()
        for source in node.all_input_nodes:
            needs[node] |= {source} if source in marked else needs[source]
            if _is_wait(source):
                needs[node] |= needs[source]
    return needs


def _starts_early(work: list[Node], needs: dict[Node, set[Node]]) -> list[Node]:
    """Kernels and collectives, each kind in its order: a collective as soon as it can begin, and before it, of the
    kernels up to where it stood, those that it needs."""
    starts = deque(node for node in work if _is_start(node))
    run: dict[Node, None] = {}
    later: deque[Node] = deque()

    def can_run(node: Node) -> bool:
        return all(source in run for source in needs[node] if not _is_wait(source))

    def begin() -> set[Node]:
        """All collectives that can, beside each the first of what gave way with what needs it, beside the last all of
        it; what the next one needs."""
        while starts and can_run(starts[0]):
            run[starts.popleft()] = None
            last = None
            while later and can_run(later[0]) and (not starts or last is None or last in needs[later[0]]):
                last = later.popleft()
                run[last] = None
        return _sources(starts[0], needs) if starts else set(work)

    wanted = begin()
    for node in work:
        if node in run:
            continue
        if node in wanted:
            run[node] = None
            wanted = begin()
        else:
            later.append(node)
    return [*run, *later]


def _sources(node: Node, needs: dict[Node, set[Node]]) -> set[Node]:
    """All that a node needs, however far back."""
    found: set[Node] = set()
    new = [node]
    while new:
        more = needs[new.pop()] - found
        found |= more
        new += more
    return found


def _named(node: Node, beginnings: tuple[str, ...]) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name().startswith(beginnings)


def _is_wait(node: Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def _is_start(node: Node) -> bool:
    return _named(node, ("_c10d_functional::",)) and not _is_wait(node)


def _tensor_of(node: Node) -> Node:
    """The node, or of one that gives several tensors one of them."""
    part = next((user for user in node.users if user.target is getitem), None)
    return node if part is None else _tensor_of(part)


def _describe(graph: Graph) -> None:
    """Say of nodes that an earlier pass has put in what they give."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            known, args, kwargs = get_fake_args_kwargs(node)
            if known:
                with V.fake_mode:
                    node.meta["val"] = node.target(*args, **kwargs)
