"""How a part of the model becomes parallel: every transform, in order. Those of a block's forward stand here:
torch.compile, and recomputation in the backward pass.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import expert_ranks, num_stages, own_routers, rank_stages, stage_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.expert_copies import has_own_experts, make_copies
from moe_dtensor.parallel.fsdp import apply_fsdp
from moe_dtensor.parallel.tensor import install_collectives, shard_parameters

_LOGGER = logging.getLogger(__name__)

ORDER_TESTED = ("2.11", "2.13")
"""Releases of torch whose private modules :mod:`.ordering` was tested with."""


def build_parts(
    config: Config, mesh: DeviceMesh, device: torch.device, *, trains: bool = True, values: bool = True
) -> list[Transformer]:
    """The model parts (pipeline stages) of this rank, parallel and initialised.

    Built on meta, so that no rank ever holds more than its own shards.

    Args:
        trains: False: it is never to have gradients, and is left out of FSDP where FSDP would have nothing to do.
        values: False leaves them on meta.

    Raises:
        ConfigError: the device has no kernels for what is asked.
    """
    if config.model.attention_backend == "fa4":
        _check_hopper(device, "model.attention_backend = fa4", "Set model.attention_backend = auto.", later=True)
    if config.moe.backend == "quack" and config.moe.num_experts:
        _check_hopper(device, "moe.backend = quack", "Set moe.backend = auto.", later=False)
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


def _check_hopper(device: torch.device, asked: str, remedy: str, *, later: bool) -> None:
    """Raise ConfigError where there are no kernels: before Hopper, and after it unless ``later``."""
    if device.type == "cpu":
        found = "these ranks are on CPUs"
    else:
        at = torch.cuda.get_device_capability(device)
        if at == (9, 0) or (later and at > (9, 0)):
            return
        found = f"this is {torch.cuda.get_device_name(device)}"
    raise ConfigError(f"{asked} needs GPUs, Hopper{' or later' if later else ''}; {found}.", remedy)


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


def apply_compile(part: Transformer, config: Config, tp: DeviceMesh) -> None:
    """Compile each block's forward. Blocks of one kind share one compilation."""
    if not config.compile.enable:
        return
    import torch._inductor.config  # loads the compiler

    # Counts that a layer reads from the device (moe.rows = exact) stay inside its graph.
    torch._dynamo.config.capture_scalar_outputs = True
    # Nothing checks at run time that a count is not below 0; torch 2.11 cannot compile that in a recomputed block.
    torch._dynamo.config.do_not_emit_runtime_asserts = True
    if config.mesh.pp > 1:
        # A pipeline keeps several microbatches' graphs alive, so a backward must not reuse their buffers.
        torch._functorch.config.donated_buffer = False
    travels = tp.device_type != "cpu" and (tp.size() > 1 or expert_ranks(config) > 1)
    _apply_order(config.compile.order and travels and can_order(torch.__version__))
    _apply_async_tp(config.compile.async_tp, tp)
    for block in part.layers.values():
        block.forward = torch.compile(block.forward)


def can_order(version: str) -> bool:
    """Whether the order pass was tested with this version of torch; if not, one line of the log says that it is off."""
    tested = ".".join(version.split(".")[:2]) in ORDER_TESTED
    if not tested:
        _LOGGER.warning(
            "compile.order is off: it was tested with torch %s, not with %s", " and ".join(ORDER_TESTED), version
        )
    return tested


def _apply_order(ordered: bool) -> None:
    order_pass = None
    if ordered:
        from moe_dtensor.parallel.ordering import OrderForOverlap  # its private imports only where they were tested

        order_pass = OrderForOverlap()
    torch._inductor.config.post_grad_custom_post_pass = order_pass
    torch._inductor.config.reorder_for_locality = not ordered  # it would undo the order before the pass sees it


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
# Of our own operators, which are kept as well, those whose outputs are not.
RECOMPUTED = tuple(
    f"moe_dtensor::{name}"
    for name in ("norm_and_rotate", "squares_of_heads", "chosen_mask", "within_capacity", "taken_by_experts")
)


def apply_recompute(part: Transformer, config: Config) -> None:
    """Recompute each block in its backward pass: ``full`` from its input, ``selective`` but for :data:`KEPT`."""
    mode = config.activation_checkpoint.mode
    if mode == "none":
        return
    for block in part.layers.values():
        # Only a router of one's own may draw random numbers; torch's state cannot be read while a graph is captured.
        draws = bool(own_routers(config))
        rerun = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws)
        if mode == "selective":
            rerun = functools.partial(rerun, context_fn=_selective_contexts)
        # On the instance, not a wrapper module: parameter names stay as they are.
        block.forward = rerun


def _selective_contexts() -> tuple:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: object, op: torch._ops.OpOverload, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    name = op.name().split(".")[0]
    keep = name in KEPT or (name.startswith("moe_dtensor::") and name not in RECOMPUTED)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
