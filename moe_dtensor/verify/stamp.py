"""``verify --stamp``: leave the verdict in a run's folder, for its checkpoints to carry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dtensor.bench.measure import provenance
from moe_dtensor.checkpoint.proof import FORMAT, STAMP_FILE, code_hashes, torch_version
from moe_dtensor.checkpoint.small_files import write_small
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import dump
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.compare import Verdict


def write_stamp(folder: Path, config: Config, verdicts: Sequence[Verdict], how: dict[str, Any]) -> Path:
    """Replace the run's stamp, also where the verdict is a bad one.

    Args:
        folder: of the run; made when needed.
        config: as it was given, not the miniature.
        verdicts: one for each mesh and schedule.
        how: dtype, backend, compiled, exact.

    Raises:
        ConfigError: the folder cannot be written.
    """
    rests_on = provenance()
    content = {
        "format": FORMAT,
        "ok": all(v.ok for v in verdicts),
        "agree": sum(v.ok for v in verdicts),
        "of": len(verdicts),
        **how,
        "layouts": [[v.mesh, v.schedule] for v in verdicts if v.ok],
        "differ": [_told(v) for v in verdicts if not v.ok],
        "config": dump(config),
        "code": code_hashes(),
        "torch": torch_version(),
        **{key: rests_on[key] for key in ("date", "commit", "device", "versions")},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_small(folder / STAMP_FILE, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{folder / STAMP_FILE} cannot be written: {error.strerror}.", "Name a run's folder after --stamp."
        ) from None
    return folder / STAMP_FILE


def _told(verdict: Verdict) -> str:
    what = verdict.failure.strip().splitlines()[-1] if verdict.failure else f"{verdict.worst.kind} {verdict.worst.name}"
    return f"{verdict.mesh} {verdict.schedule}: {what}"
