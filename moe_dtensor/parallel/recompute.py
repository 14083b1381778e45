"""Activation recomputation, block by block."""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer

# What selective recomputation keeps: outputs that are dear to compute and cheap to hold.
KEPT = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    "aten::_grouped_mm",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_reduce",
)


def apply_recompute(part: Transformer, config: Config) -> None:
    """Recompute each block in its backward pass: ``full`` from its input, ``selective`` but for :data:`KEPT`."""
    mode = config.activation_checkpoint.mode
    if mode == "none":
        return
    for block in part.layers.values():
        rerun = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if mode == "selective":
            rerun = functools.partial(rerun, context_fn=_selective_contexts)
        # On the instance, not a wrapper module: parameter names stay as they are.
        block.forward = rerun


def _selective_contexts() -> tuple:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: object, op: torch._ops.OpOverload, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    name = op.name().split(".")[0]
    keep = name in KEPT or name.startswith("moe_dtensor::")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
