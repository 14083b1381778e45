"""torch.compile, block by block."""

from __future__ import annotations

import torch

from moe_dtensor.config.resolve import expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.ordering import OrderForOverlap


def apply_compile(part: Transformer, config: Config) -> None:
    """Compile each block's forward. Blocks of one kind share one compilation."""
    if not config.compile.enable:
        return
    # Counts that a layer reads from the device (moe.rows = exact) stay inside its graph.
    torch._dynamo.config.capture_scalar_outputs = True
    if config.mesh.pp > 1:
        # A pipeline keeps several microbatches' graphs alive, so a backward must not reuse their buffers.
        torch._functorch.config.donated_buffer = False
    if config.mesh.tp > 1 or expert_ranks(config) > 1:
        torch._inductor.config.reorder_for_locality = False
        torch._inductor.config.post_grad_custom_post_pass = OrderForOverlap()
    for block in part.layers.values():
        block.forward = torch.compile(block.forward)
