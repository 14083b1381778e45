"""Config → DeviceMesh. The axes are (dp, pp, tp), tp innermost; axes of size 1 stay."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_dtensor.config.schema import Config

AXES = ("dp", "pp", "tp")


def build_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """The (dp, pp, tp) mesh over all ranks of the default process group."""
    shape = (config.mesh.dp, config.mesh.pp, config.mesh.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    # Known as one axis too, so that DTensor sums a gradient norm over both with one collective.
    mesh["dp", "tp"]._flatten("dp_tp")
    return mesh
