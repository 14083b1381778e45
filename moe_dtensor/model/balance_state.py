"""The state that balancing keeps between steps. L MoE blocks of the whole model, E experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer


class BalanceState:
    """Biases and loads of all MoE blocks, the same on every rank; each router reads its row.

    Args:
        config: resolved.
        parts: the model parts of this rank.
        device: of this rank.
    """

    def __init__(self, config: Config, parts: Iterable[Transformer], device: torch.device) -> None:
        layers = sorted(moe_layers(config))
        shape = (len(layers), config.moe.num_experts)
        self.rate = config.moe.bias_rate
        self.bias_LE = torch.zeros(shape, dtype=torch.float32, device=device)
        """What only the choice sees."""
        self.previous_load_LE = torch.zeros(shape, dtype=torch.float64, device=device)
        """Copies sent to each expert in the last step; 0 before the first."""
        for part in parts:
            for layer in part.moe_layers:
                row, router = layers.index(layer), part.get_submodule(f"layers.{layer}.moe.router")
                router.bias, router.previous_load = self.bias_LE[row], self.previous_load_LE[row]

    @torch.no_grad()
    def step(self, load_LE: Tensor, finite: Tensor) -> Tensor:
        """Take over a step's load over all ranks. An expert's bias moves by ``moe.bias_rate`` toward the average load
        (arXiv:2408.15664, algorithm 1), unless the step's update was not applied.

        Returns:
            Churn, ``(L,)``: the share of copies that would have to change experts to turn the last step's load into
            this one's; 0 in the first step.
        """
        share_LE, before_LE = (x / x.sum(1, keepdim=True).clamp(min=1) for x in (load_LE, self.previous_load_LE))
        churn_L = (share_LE - before_LE).abs().sum(1) / 2 * (before_LE.sum(1) > 0)
        self.previous_load_LE.copy_(load_LE)
        if self.rate > 0:
            toward_LE = (load_LE.mean(1, keepdim=True) - load_LE).sign() * finite
            self.bias_LE.add_(toward_LE.float(), alpha=self.rate)
        return churn_L

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, alike on every rank."""
        return {"bias": self.bias_LE, "previous_load": self.previous_load_LE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, in place: routers hold views of it."""
        self.bias_LE.copy_(state_dict["bias"])
        self.previous_load_LE.copy_(state_dict["previous_load"])
