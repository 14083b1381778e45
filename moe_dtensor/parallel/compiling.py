"""torch.compile, block by block."""

from __future__ import annotations

import logging

import torch
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.model.transformer import Transformer


def apply_compile(part: Transformer, config: Config, tp: DeviceMesh) -> None:
    """Compile each block's forward. Blocks of one kind share one compilation."""
    if not config.compile.enable:
        return
    from moe_dtensor.parallel.ordering import OrderForOverlap  # loads the compiler

    # Counts that a layer reads from the device (moe.rows = exact) stay inside its graph.
    torch._dynamo.config.capture_scalar_outputs = True
    if config.mesh.pp > 1:
        # A pipeline keeps several microbatches' graphs alive, so a backward must not reuse their buffers.
        torch._functorch.config.donated_buffer = False
    travels = tp.device_type != "cpu" and (tp.size() > 1 or expert_ranks(config) > 1)
    torch._inductor.config.post_grad_custom_post_pass = OrderForOverlap() if travels else None
    torch._inductor.config.reorder_for_locality = not travels  # it would undo the order before the pass sees it
    _apply_async_tp(config.compile.async_tp, tp)
    for block in part.layers.values():
        block.forward = torch.compile(block.forward)


def _apply_async_tp(wanted: bool, tp: DeviceMesh) -> None:
    torch._inductor.config._micro_pipeline_tp = wanted and tp.size() > 1
    if not wanted or tp.size() == 1:
        return
    if tp.device_type == "cpu":
        raise ConfigError(
            "compile.async_tp = true needs GPUs that reach each other's memory; these ranks are on CPUs.",
            "Set compile.async_tp = false.",
        )
    # It warns of each collective that stands next to no product, as those of the experts do.
    logging.getLogger("torch._inductor.fx_passes.micro_pipeline_tp").setLevel(logging.ERROR)
    enable_symm_mem_for_group(tp.get_group().group_name)
