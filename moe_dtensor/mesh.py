"""Config → DeviceMesh. The axes are (dp, pp, tp), tp innermost; axes of size 1 stay.

Where dp has two levels, or several groups of its ranks share experts, a view of the same mesh has dp cut into axes.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_dtensor.config.resolve import expert_dp_ranks, expert_groups, expert_shards, shard_ranks
from moe_dtensor.config.schema import Config

AXES = ("dp", "pp", "tp")


def build_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """The (dp, pp, tp) mesh over all ranks of the default process group."""
    shape = (config.mesh.dp, config.mesh.pp, config.mesh.tp)
    return init_device_mesh(device.type, shape, mesh_dim_names=AXES)


def fsdp_mesh(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    """Where FSDP shards: dp, or under ``mesh.dp_replicate`` its groups and, innermost, the ranks in one."""
    if config.mesh.dp_replicate == 1:
        return mesh["dp"]
    return _view(mesh, dp_replicate=config.mesh.dp_replicate, dp_shard=shard_ranks(config))["dp_replicate", "dp_shard"]


def expert_mesh(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    """Where experts on dp ranks live, as far as FSDP does not split them: (ranks that share experts, tp). Where groups
    hold them alike those come first."""
    if expert_groups(config) == 1:
        return mesh["dp", "tp"]
    if expert_shards(config) > 1:
        return _sharded_view(config, mesh)["dp_experts", "tp"]
    return _replicated_view(config, mesh)["dp_groups", "dp_experts", "tp"]


def expert_fsdp_mesh(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    """Where FSDP shards experts on dp ranks: across the groups that share them, and replicas of those groups."""
    view = _sharded_view(config, mesh)
    return view["dp_groups"] if config.mesh.dp_replicate == 1 else view["dp_replicate", "dp_groups"]


def expert_axis(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that share whole experts, as one axis."""
    if config.mesh.experts not in ("dp", "dp_tp"):
        return mesh[config.mesh.experts]
    both = expert_mesh(config, mesh)
    over_dp = both[both.mesh_dim_names[-2]]  # type: ignore[index]
    if config.mesh.experts == "dp":
        return over_dp
    return both[over_dp.mesh_dim_names[0], "tp"]._flatten("dp_tp")  # type: ignore[index]


def _replicated_view(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    return _view(mesh, dp_groups=expert_groups(config), dp_experts=expert_dp_ranks(config))


def _sharded_view(config: Config, mesh: DeviceMesh) -> DeviceMesh:
    copies = {"dp_replicate": config.mesh.dp_replicate} if config.mesh.dp_replicate > 1 else {}
    return _view(mesh, **copies, dp_groups=expert_shards(config), dp_experts=expert_dp_ranks(config))


def _view(mesh: DeviceMesh, **sizes: int) -> DeviceMesh:
    """The mesh with dp cut into axes, outermost first. Made once: each is process groups."""
    made = mesh.__dict__.setdefault("views_of_dp", {})
    key = tuple(sizes.items())
    if key not in made:
        assert mesh.mesh_dim_names is not None
        # By number: torch 2.11 refuses every name.
        made[key] = mesh._unflatten(mesh.mesh_dim_names.index("dp"), tuple(sizes.values()), tuple(sizes))
    return made[key]
