"""What each checkpoint of a run says of where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import torch
from torch import Tensor

from moe_dtensor.checkpoint.proof import PROOF_FILE, proof_text, read_stamp
from moe_dtensor.config.load import dump
from moe_dtensor.config.schema import Config
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.run_folder import RunFolder


def carried_files(
    folder: RunFolder,
    config: Config,
    device: torch.device,
    step: int,
    routing: Mapping[str, Value],
    warn: Callable[[str], None],
) -> dict[str, str]:
    """Name and text of the file that a checkpoint carries. Rank 0's work; reads ``routing`` from the device.

    Args:
        config: of the step, resolved on this run's mesh.
        routing: diagnostics of the step's MoE blocks by name, ``(L,)`` each.
        warn: takes what is wrong with the run's stamp: the checkpoint then carries none.
    """
    try:
        stamp = read_stamp(folder.path)
    except (OSError, ValueError) as error:
        warn(f"warning: the checkpoint of step {step} carries no proof: {error}.")
        stamp = None
    mesh = config.mesh
    saved = {
        "run_id": folder.run_id,
        "step": step,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "mesh": f"{mesh.dp}x{mesh.pp}x{mesh.tp}",
        "schedule": config.pipeline.schedule if mesh.pp > 1 else "none",
        "config": dump(folder.config),
        "data": folder.run["data"],
        "routing": {name: value.tolist() if isinstance(value, Tensor) else value for name, value in routing.items()},
    }
    return {PROOF_FILE: proof_text(stamp, saved)}
