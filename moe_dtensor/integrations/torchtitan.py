"""These experts in models of torchtitan 0.2, as a model converter, its own extension point.

    torchtitan ... --experimental.custom_import moe_dtensor.integrations.torchtitan --model.converters moe_dtensor

Importing this module registers the converter, as torchtitan expects of a custom import. Parameters keep their names and
shapes, so checkpoints are the same with it and without. T tokens, K choices, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.moe import MoE
from torchtitan.protocols.model_converter import register_model_converter

from moe_dtensor.kernels.experts.mlp import expert_mlp

NAME = "moe_dtensor"


class KernelMoE(MoE):
    """torchtitan's MoE, whose tokens are sorted, permuted, multiplied and summed by this package's kernels.

    Router, shared experts, balancing and their state are torchtitan's own.
    """

    def __init__(self, moe: MoE) -> None:
        nn.Module.__init__(self)
        # The same children, buffers and settings: the original is not used any more.
        self.__dict__.update(moe.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, sequence, D)`` in and out."""
        x_TD = x.flatten(0, 1)
        gate_TK, expert_TK, tokens_per_expert = self.router(x_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(tokens_per_expert)
        experts_x_TD = x_TD
        if self.score_before_experts:
            experts_x_TD, gate_TK = (x_TD.float() * gate_TK).to(x.dtype), torch.ones_like(gate_TK)
        experts = self.experts
        # As torchtitan's own grouped GEMMs do, whatever the weights are kept in.
        dtype = torch.bfloat16 if experts.use_grouped_mm else x.dtype
        y_TD = expert_mlp(
            experts_x_TD.to(dtype),
            torch.stack([experts.w1, experts.w3], 1).to(dtype),
            experts.w2.to(dtype),
            gate_TK,
            expert_TK,
            activation="swiglu",
        ).to(x.dtype)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x)


class Converter:
    """Replaces every MoE of a model, before it is sharded and compiled.

    Raises:
        ValueError: expert or tensor parallelism is on, which torchtitan attaches to its own experts' forward.
    """

    def __init__(self, job_config: Any, parallel_dims: Any) -> None:
        if parallel_dims.ep > 1 or parallel_dims.tp > 1:
            raise ValueError(
                f"model.converters = {NAME} takes whole experts on every rank, but expert parallelism is "
                f"{parallel_dims.ep} and tensor parallelism {parallel_dims.tp}. Set both degrees to 1 (FSDP is fine), "
                "or leave the converter out."
            )

    def convert(self, model: nn.Module) -> None:
        """Replace the MoE modules in place.

        Raises:
            ValueError: one multiplies what several experts read by their scores; or there is none.
        """
        found = [(parent, name) for parent in model.modules() for name, m in parent.named_children() if type(m) is MoE]
        if not found:
            raise ValueError(f"model.converters = {NAME}: the model has no torchtitan.models.moe.MoE.")
        for parent, name in found:
            moe = getattr(parent, name)
            if moe.score_before_experts and moe.router.top_k > 1:
                raise ValueError(
                    f"model.converters = {NAME} weights what experts give; this model weights what its "
                    f"{moe.router.top_k} experts a token read. Set score_before_experts = False."
                )
            setattr(parent, name, KernelMoE(moe))

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""


register_model_converter(Converter, NAME)
