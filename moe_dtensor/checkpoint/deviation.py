"""How far a changed feed-forward is from the one before it, on random tokens. T tokens, D width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.tokens import build_tokens

TOKENS = 64


def feed_forward_output(
    config: Config, layer: int, values: Mapping[str, Tensor], bias_E: Tensor | None, x_TD: Tensor
) -> Tensor:
    """What the feed-forward or the mixture of one block gives for normalised tokens ``(T, D)``, in evaluation.

    Args:
        config: resolved.
        layer: index of the block.
        values: parameters by their name within the module.
        bias_E: the selection bias, if there is one.
        x_TD: the dtype that is computed in.
    """
    config = replace(config, moe=replace(config.moe, backend="reference"))
    with torch.device("meta"):
        module: nn.Module
        if layer in moe_layers(config):
            module = MoE(config, layer)
        else:
            model = config.model
            module = FeedForward(model.dim, model.hidden_dim, model.activation, model.ffn_bias)
    module.to_empty(device="cpu").to(x_TD.dtype).eval()
    module.load_state_dict({name: value.to(x_TD.dtype) for name, value in values.items()})
    if not isinstance(module, MoE):
        return module(x_TD)
    experts = config.moe.num_experts
    module.router.bias = torch.zeros(experts) if bias_E is None else bias_E.float()
    module.router.previous_load = torch.zeros(experts)
    ids_BS = torch.zeros(1, len(x_TD), dtype=torch.int64)
    return module(x_TD[None], build_tokens(ids_BS, None))[0][0]


@torch.no_grad()
def deviation(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], dim: int, dtype: torch.dtype = torch.float64
) -> float:
    """``‖after - before‖ / ‖before‖`` over random normalised tokens."""
    x_TD = torch.randn(TOKENS, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    old_TD, new_TD = before(x_TD), after(x_TD)
    return float((new_TD - old_TD).norm() / old_TD.norm())
