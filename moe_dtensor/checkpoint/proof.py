"""What a run and its checkpoints carry of ``verify``'s verdict, and what that rests on. Loads no torch.

``verify --stamp`` leaves ``stamp.json`` in a run's folder. Each checkpoint saved from then on, and a Hugging Face
folder made of one, holds ``proof.json``: the stamp, and what the checkpoint was made by.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moe_dtensor

STAMP_FILE = "stamp.json"
PROOF_FILE = "proof.json"
FORMAT = 1
ROOMS = (
    *("config", "placement.py", "kernels", "layers", "model", "mesh.py", "data", "parallel", "checkpoint", "train"),
    "verify",
)
"""Whose code decides what a step computes, or how that is judged."""


@cache
def code_hashes() -> dict[str, str]:
    """Of each room of :data:`ROOMS` a hash of its Python files, as they lie here."""
    root = Path(moe_dtensor.__file__).parent
    return {room: _hash(root / room) for room in ROOMS}


def _hash(place: Path) -> str:
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        digest.update(f"{path.relative_to(place.parent).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def torch_version() -> str:
    """Of the installed torch; empty if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def read_stamp(run_folder: Path) -> dict[str, Any] | None:
    """What ``verify --stamp`` left in a run's folder; None if nothing.

    Raises:
        ValueError: it cannot be read.
    """
    return _read(run_folder / STAMP_FILE)


def read_proof(folder: Path) -> dict[str, Any] | None:
    """The same of a checkpoint or an exported folder."""
    return _read(folder / PROOF_FILE)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    return content


def proof_text(stamp: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> str:
    """``proof.json``.

    Args:
        stamp: of the run; None where it has none.
        saved: what made the checkpoint: config, data, step, mesh, routing. Code and torch are added.
    """
    made_by = {"code": code_hashes(), "torch": torch_version(), **saved}
    return json.dumps({"format": FORMAT, "stamp": stamp, "saved": made_by}, indent=1) + "\n"


def copy_proof(checkpoint: Path, folder: Path) -> None:
    """Let what is made of a checkpoint carry its proof too."""
    if (checkpoint / PROOF_FILE).is_file():
        shutil.copyfile(checkpoint / PROOF_FILE, folder / PROOF_FILE)
