"""What ``verify --json`` writes: verdicts, and what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_dtensor.bench.measure import provenance
from moe_dtensor.config.command_line import write_json
from moe_dtensor.verify.cases import Case
from moe_dtensor.verify.compare import Verdict


def write_record(path: Path, verdicts: Sequence[Verdict], cases: Sequence[tuple[str, Case]], compiled: bool) -> None:
    """A list of one object for each verdict; each has commit, device, versions, dtype, kernels and whether compiled."""
    rests_on = provenance() | {"compiled": compiled}
    rows: list[dict[str, Any]] = [
        verdict.to_json()
        | {
            "dtype": case.config.training.param_dtype,
            "backend": case.config.moe.backend,
            "variant": name,
            **rests_on,
            "device": rests_on["device"] if torch.cuda.device_count() >= case.layout.world_size else "cpu",
        }
        for verdict, (name, case) in zip(verdicts, cases, strict=True)
    ]
    write_json(path, rows)
