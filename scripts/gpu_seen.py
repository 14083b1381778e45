"""How many commits to the rooms that only GPUs run whole no GPU has seen: one line, for the end of a test run."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "parallel", "train")
RECORDS = "docs/results/*_proof.json"


def tree_hashes() -> dict[str, str]:
    """Git's hash of each room as it lies here, with no git at hand: a copy on another machine may have none."""
    return {room: _tree(ROOT / "moe_dtensor" / room).hex() for room in ROOMS}


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            # Git sorts a folder as if its name ended in a slash.
            entries.append((path.name.encode() + b"/", b"40000", _tree(path)))
        elif path.is_file() and path.suffix != ".pyc":
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            entries.append((path.name.encode(), mode, _object("blob", path.read_bytes())))
    return _object("tree", b"".join(b"%b %b\0%b" % (m, name.rstrip(b"/"), h) for name, m, h in sorted(entries)))


def _object(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def _but(record: dict[str, Any]) -> str:
    missed = ", ".join(part["name"] for part in record["parts"] if not part["ok"])
    return f", but these parts failed or did not end: {missed}" if missed else ""


def unseen() -> str:
    """The line."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob(RECORDS))]
    # Of two records of the same trees the one in which all parts passed.
    records.sort(key=lambda record: record["ok"])
    seen = {tuple(record["trees"][room] for room in ROOMS): record for record in records}
    if not seen:
        return "GPU: no record of tests/gpu.sh is in docs/results."
    if (record := seen.get(tuple(tree_hashes()[room] for room in ROOMS))) is not None:
        by = f"{record['gpus']} x {record['device']} has seen these kernels/, parallel/ and train/"
        return f"GPU: {by}." if record["ok"] else f"warning: {by}{_but(record)}."
    for count, commit in enumerate(_git("log", "--format=%H", "--", *(f"moe_dtensor/{room}" for room in ROOMS))):
        trees = tuple(_git("rev-parse", *(f"{commit}:moe_dtensor/{room}" for room in ROOMS)))
        if (record := seen.get(trees)) is not None:
            return (
                f"warning: no GPU has seen the last {count} commits to kernels/, parallel/ and train/, nor what is not "
                f"committed of them; {record['gpus']} x {record['device']} saw {commit[:7]}{_but(record)}."
            )
    return "warning: no GPU has seen any commit of this history to kernels/, parallel/ and train/. Run tests/gpu.sh."


if __name__ == "__main__":
    print(unseen())
