"""FSDP2 over the dp axis: block by block, gradients summed, never averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import expert_shards
from moe_dtensor.config.schema import Config
from moe_dtensor.kernels.update import add_narrow, widened
from moe_dtensor.mesh import expert_fsdp_mesh, fsdp_mesh
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.placement import Row, build_table, find_row


def apply_fsdp(part: Transformer, config: Config, mesh: DeviceMesh) -> None:
    """Shard a part's parameters over dp, each along the dimension that the placement table names.

    Also at dp = 1: FSDP casts to ``param_dtype``, accumulates in ``reduce_dtype`` and sums gradients over tp.
    """
    table = build_table(config)
    rows = {param: find_row(table, name) for name, param in part.named_parameters()}
    training, fsdp = config.training, config.fsdp
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, training.param_dtype),
        reduce_dtype=getattr(torch, training.reduce_dtype),
        cast_forward_inputs=False,
    )
    dp, place = fsdp_mesh(config, mesh), _shard_placement(config, mesh)
    # CPU ranks have everything in host memory as it is.
    moves = fsdp.cpu_offload and dp.device_type != "cpu"
    offload: OffloadPolicy = CPUOffloadPolicy() if moves else OffloadPolicy()
    for module in [*part.layers.values(), part]:
        fully_shard(
            module,
            mesh=dp,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=fsdp.reshard_after_forward == "always",
            shard_placement_fn=lambda param: place(rows[param]),
            ignored_params={param for param, row in rows.items() if not row.fsdp},
        )
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # Sums, so that nothing is scaled twice; gloo has no PREMUL_SUM, so the sum is forced.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            for group in _groups(module):
                for param in group.fsdp_params:
                    _add_up_fast(param)
                if _sends_nothing(group):
                    _hand_over_gradients(group)
                else:
                    _sum_over_tp_in_reduce_dtype(group)


def _shard_placement(config: Config, mesh: DeviceMesh) -> Callable[[Row], Any]:
    """Where a row's parameters are sharded, in the words of ``fully_shard``: over dp, or across groups of experts."""
    if expert_shards(config) == 1:
        return lambda row: Shard(row.dp)
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise ConfigError(
            f"mesh.expert_weights = sharded needs a newer torch than {torch.__version__}.",
            "Install torch 2.13, or set mesh.expert_weights = replicated.",
        ) from None
    dense, groups = fsdp_mesh(config, mesh), expert_fsdp_mesh(config, mesh)
    over_dp = FSDPMeshInfo(dense, 0) if dense.ndim == 1 else HSDPMeshInfo(dense, 1, 0)
    across = FSDPMeshInfo(groups, 0) if groups.ndim == 1 else HSDPMeshInfo(groups, 1, 0)
    if groups.mesh.equal(dense.mesh):  # each rank has all experts: the same ranks, of which FSDP wants one object
        across = over_dp

    def place(row: Row) -> Any:
        if row.groups is None:
            return ShardPlacementResult(Shard(row.dp), over_dp)
        return ShardPlacementResult(Shard(row.groups), across)

    return place


def _groups(module: FSDPModule) -> list[Any]:
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    # torch 2.11 has one group or None in a module.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _add_up_fast(param: Any) -> None:
    """Have FSDP add a parameter's gradients up over microbatches by our kernels."""

    def begin() -> None:
        grad = param._unsharded_param.grad
        if param.reduce_dtype is None or grad is None or grad.dtype == param.reduce_dtype:
            return
        param._unsharded_param.grad = None
        param.unsharded_accumulated_grad = _like(grad, widened(local_part(grad), param.reduce_dtype))

    def add() -> None:
        total = param.unsharded_accumulated_grad
        if total is None or param.unsharded_param.grad is None:
            return
        grad, param.unsharded_param.grad = param.unsharded_param.grad, None
        assert not isinstance(grad, DTensor) or grad.placements == total.placements
        add_narrow(local_part(total), local_part(grad))

    param.to_accumulated_grad_if_needed, param.accumulate_unsharded_grad_if_needed = begin, add


def _like(grad: Tensor, local: Tensor) -> Tensor:
    if not isinstance(grad, DTensor):
        return local
    return DTensor.from_local(
        local, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )


def _sends_nothing(group: Any) -> bool:
    """Whether a group's shards are whole, on their device, and not summed with copies elsewhere."""
    mesh = group.mesh_info
    moves = any(param.offload_to_cpu for param in group.fsdp_params)
    return getattr(mesh, "replicate_mesh_dim", None) is None and mesh.shard_mesh_size == 1 and not moves


def _hand_over_gradients(group: Any) -> None:
    """Make the gradients of whole parameters those of their shards as they are.

    FSDP would copy them three times: side by side, divided by 1, and out again.
    """
    accumulate = group.post_backward

    def accumulate_and_hand_over(*unused: Any) -> None:
        reduces, group.reduce_grads = group.reduce_grads, False
        accumulate(*unused)
        group.reduce_grads = reduces
        for param in group.fsdp_params if reduces else ():
            if not hasattr(param, "_unsharded_param"):
                continue
            summed = param.unsharded_accumulated_grad
            grad = param._unsharded_param.grad if summed is None else summed
            if grad is None:
                continue
            param.unsharded_accumulated_grad = param._unsharded_param.grad = None
            # Summed over tp, where gradients are partial sums over it.
            whole = param._get_grad_inner_tensor(grad).to(group._orig_dtype).contiguous()
            if param.sharded_param.grad is None:
                param.sharded_param.grad = param.to_sharded_dtensor(whole)
            else:
                param.sharded_param.grad._local_tensor += whole

    group.post_backward = accumulate_and_hand_over


def _sum_over_tp_in_reduce_dtype(group: Any) -> None:
    """Widen gradients that are partial sums over tp before FSDP sums them.

    FSDP sums what has accumulated over microbatches in ``reduce_dtype``, but a first gradient that is also the last as
    it is, in ``param_dtype``. All of a group are widened then: FSDP asks that its gradients have one dtype.
    """
    reduce = group.post_backward

    def widen_and_reduce(*unused: Any) -> None:
        grads = [param._unsharded_param.grad for param in group.fsdp_params if hasattr(param, "_unsharded_param")]
        if any(isinstance(grad, DTensor) and _is_partial(grad) for grad in grads):
            for param in group.fsdp_params:
                if param.unsharded_accumulated_grad is None:
                    param.to_accumulated_grad_if_needed()
        reduce(*unused)

    group.post_backward = widen_and_reduce


def _is_partial(grad: DTensor) -> bool:
    return any(place.is_partial() and grad.device_mesh.size(i) > 1 for i, place in enumerate(grad.placements))


def reshard(part: nn.Module) -> None:
    """Give gathered weights back after forward passes without a backward, so that a part's parameters are its shards
    again."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def next_microbatch(part: nn.Module, config: Config, last: bool) -> None:
    """Whether the next backward gives gathered weights back, and reduces gradients over dp or only accumulates them.

    Args:
        part: a model part under FSDP.
        config: resolved, ``fsdp.accumulate`` settled.
        last: whether it is the step's last.
    """
    assert isinstance(part, FSDPModule)
    part.set_is_last_backward(last)
    part.set_requires_gradient_sync(last or config.fsdp.accumulate == "sharded")
    part.set_requires_all_reduce(last)
    part.set_reshard_after_backward(last or config.fsdp.reshard_after_forward == "always")


def reduce_each(part: FSDPModule, last: bool) -> None:
    """Have the next backward pass of a pipeline reduce its gradients over dp, and gathered weights stay.

    Args:
        part: a model part under FSDP.
        last: whether it is the step's last: sums across the groups of ``mesh.dp_replicate`` come with it.
    """
    part.set_is_last_backward(False)
    part.set_reshard_after_backward(False)
    part.set_requires_gradient_sync(True)
    part.set_requires_all_reduce(last)


def reduce_now(part: FSDPModule, last: bool) -> None:
    """Reduce over dp what gradients a part has, outside of a backward pass; see :func:`reduce_each`."""
    reduce_each(part, last)
    for module in part.modules():  # type: ignore[attr-defined]
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                group.post_backward()


class GradientSum(NamedTuple):
    """Where a parameter's gradients add up until they are reduced."""

    tensor: Tensor
    owner: Any
    attribute: str


def stay_in_place(part: nn.Module) -> None:
    """Have gathered weights keep their memory when they are given back, so that they are gathered into it again."""
    for group in _all_groups(part):
        for param in group.fsdp_params:
            param.free_unsharded_param = _do_nothing


def _do_nothing() -> None:
    pass


def gather(part: nn.Module) -> None:
    """Gather all weights of a part at once."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def only_accumulate(part: nn.Module) -> None:
    """Have every next backward pass leave weights gathered and gradients as they add up."""
    assert isinstance(part, FSDPModule)
    part.set_is_last_backward(False)
    part.set_requires_gradient_sync(False)
    part.set_reshard_after_backward(False)


def gradient_sums(part: nn.Module) -> list[GradientSum]:
    """Of a part whose gradients only accumulated and whose weights are gathered."""
    wide = [
        param
        for group in _all_groups(part)
        for param in group.fsdp_params
        if param.unsharded_accumulated_grad is not None
    ]
    sums = [GradientSum(param.unsharded_accumulated_grad, param, "unsharded_accumulated_grad") for param in wide]
    return sums + [GradientSum(param.grad, param, "grad") for param in part.parameters() if param.grad is not None]


def reduce_at_end(part: nn.Module) -> None:
    """Reduce over dp what has accumulated, outside of a backward pass, and give gathered weights back."""
    assert isinstance(part, FSDPModule)
    part.set_is_last_backward(True)
    part.set_requires_gradient_sync(True)
    part.set_requires_all_reduce(True)
    part.set_reshard_after_backward(True)
    fully_shard.state(part)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def _all_groups(part: nn.Module) -> list[Any]:
    return [group for module in part.modules() if isinstance(module, FSDPModule) for group in _groups(module)]
