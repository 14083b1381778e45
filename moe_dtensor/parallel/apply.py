"""How a part of the model becomes parallel: every transform, in order."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.resolve import num_stages, rank_stages, stage_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.blocks import apply_compile, apply_recompute
from moe_dtensor.parallel.expert_copies import has_own_experts, make_copies
from moe_dtensor.parallel.fsdp import apply_fsdp
from moe_dtensor.parallel.tensor import install_collectives, shard_parameters


def build_parts(
    config: Config, mesh: DeviceMesh, device: torch.device, *, trains: bool = True, values: bool = True
) -> list[Transformer]:
    """The model parts (pipeline stages) of this rank, parallel and initialised.

    Built on meta, so that no rank ever holds more than its own shards.

    Args:
        trains: False: it is never to have gradients, and is left out of FSDP where FSDP would have nothing to do.
        values: False leaves them on meta.
    """
    parts = []
    for stage in rank_stages(config, mesh["pp"].get_local_rank()):
        with torch.device("meta"):
            part = Transformer(
                config, stage_layers(config, stage), first=stage == 0, last=stage == num_stages(config) - 1
            )
        part.to(getattr(torch, config.training.dtype))
        parallelize(part, config, mesh, trains=trains)
        if values:
            part.to_empty(device="cpu" if config.fsdp.cpu_offload else device)
            init_weights(part, config)
        if has_own_experts(config):
            make_copies(part, config)
        parts.append(part)
    return parts


def parallelize(part: Transformer, config: Config, mesh: DeviceMesh, *, trains: bool = True) -> None:
    """tp and experts, then recomputation, then compilation, then FSDP around all of it."""
    shard_parameters(part, config, mesh)
    install_collectives(part, config, mesh)
    if config.activation_checkpoint.mode == "full":
        # Around the compiled block: what is recomputed is all of it, and torch 2.13 cannot compile the other way round
        # where a block's collectives are inside.
        apply_compile(part, config, mesh["tp"])
        apply_recompute(part, config)
    else:
        apply_recompute(part, config)
        apply_compile(part, config, mesh["tp"])
    casts = config.training.dtype != config.training.param_dtype
    if trains or casts or config.fsdp.cpu_offload or mesh["dp"].size() > 1:
        apply_fsdp(part, config, mesh)
