"""torch.compile, block by block."""

from __future__ import annotations

import torch

from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer


def apply_compile(part: Transformer, config: Config) -> None:
    """Compile each block's forward. Blocks of one kind share one compilation."""
    if not config.compile.enable:
        return
    # Counts that a layer reads from the device (moe.rows = exact) stay inside its graph.
    torch._dynamo.config.capture_scalar_outputs = True
    if config.mesh.pp > 1:
        # A pipeline keeps several microbatches' graphs alive, so a backward must not reuse their buffers.
        torch._functorch.config.donated_buffer = False
    for block in part.layers.values():
        block.forward = torch.compile(block.forward)
