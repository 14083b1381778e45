"""AdamW whose moments have another dtype than the weights: half the memory in bfloat16, with torch's own update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

PIECE = 1 << 26
"""Elements that are widened at a time."""


class NarrowMomentsAdamW(AdamW):
    """Widens a piece of weight, gradient and moments, lets torch's fused AdamW update them, and rounds what is kept."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients; on a GPU not at all where ``found_inf`` is above 0."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        kept = [_flat(x) for x in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        beta1, beta2 = group["betas"]
        done = state["step"]
        # A rank may hold nothing of a parameter; its count of steps goes on with the others'.
        for pieces in zip(*(x.split(PIECE) for x in kept), strict=True):
            done = state["step"].clone()
            wide = [x.to(torch.promote_types(pieces[0].dtype, pieces[2].dtype)) for x in pieces]
            weight, grad, first, second = ([x] for x in wide)
            adamw(
                *(weight, grad, first, second, [], [done]),
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for x, y in zip(pieces, wide, strict=True):
                if x is not y and x is not pieces[1]:
                    x.copy_(y)
        state["step"].copy_(done)


def _flat(x: Tensor | None) -> Tensor:
    assert x is not None
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.detach().view(-1)
