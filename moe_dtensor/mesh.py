"""Config → DeviceMesh. The axes are (dp, pp, tp), tp innermost; axes of size 1 stay."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_dtensor.config.schema import Config

AXES = ("dp", "pp", "tp")


def build_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """The (dp, pp, tp) mesh over all ranks of the default process group."""
    shape = (config.mesh.dp, config.mesh.pp, config.mesh.tp)
    return init_device_mesh(device.type, shape, mesh_dim_names=AXES)


def flat_dp_tp(mesh: DeviceMesh) -> DeviceMesh:
    """dp and tp as one axis, dp outermost: the ranks of a pipeline stage."""
    return mesh["dp", "tp"]._flatten("dp_tp")
