"""What a measured number rests on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Date, commit, device and versions, to stand beside results in a JSON file.

    The commit is ``MOE_DTENSOR_COMMIT`` where a copy without git is run, else git's; None if neither is known.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("MOE_DTENSOR_COMMIT") or (found if len(found) == 40 else None),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton", "torchtitan", "transformers")}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
