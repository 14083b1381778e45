"""Other projects' MoE layers, timed by ``bench layer`` where they are installed: fresh weights, same sizes,
compiled where ours is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe_dtensor.bench.shapes import Layer, Shape

Build = Callable[["Shape", "Layer", bool], Callable[[], None]]


def installed_peers() -> dict[str, Build]:
    """Names and builders of the peers that can be imported here."""
    return {"torchtitan": _torchtitan} if importlib.util.find_spec("torchtitan") else {}


def _torchtitan(shape: Shape, layer: Layer, compiled: bool) -> Callable[[], None]:
    """torchtitan's layer (gated SiLU whatever the shape's activation), with softmax scores and no shared expert."""
    from torchtitan.models.moe import MoE, MoEArgs

    args = MoEArgs(
        num_experts=shape.experts,
        num_shared_experts=0,
        score_func="softmax",
        top_k=shape.top_k,
        score_before_experts=False,
        load_balance_coeff=None,
    )
    x_1TD, dy_1TD = layer.x_TD.detach()[None].requires_grad_(), layer.dy_TD[None]
    with torch.device(layer.x_TD.device):
        moe = MoE(args, shape.dim, shape.hidden)
    with torch.no_grad():
        moe.init_weights(0.02, layer.x_TD.device)
    moe.to(layer.x_TD.dtype)
    if compiled:
        moe.compile(dynamic=False)

    def step() -> None:
        moe(x_1TD).backward(dy_1TD)
        # No gradient outlives a step, so that its memory is a step's from nothing.
        moe.zero_grad()
        x_1TD.grad = None

    return step
