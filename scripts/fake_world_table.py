"""Measure ranks of large worlds, one after the other on this machine, and write what was found:
python scripts/fake_world_table.py OUT.json

Prints the tables of docs/cluster.md, "What grows with the world"; with ``--print`` those of a file that is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_dtensor.bench.measure import provenance  # noqa: E402


class Case(NamedTuple):
    """A rank of a world."""

    config: str
    mesh: str
    flags: str = ""
    ranks: tuple[int, ...] = (0, 1, -1)


QWEN, DEEPSEEK = "qwen3_30b_a3b", "deepseek_v3_671b"
ALONE = "--pipeline.schedule 1F1B"
CASES = [
    Case(QWEN, "8x1x8", ALONE, (0,)),
    Case(QWEN, "64x1x8", ALONE, (0,)),
    Case(QWEN, "512x1x8", ALONE),
    Case(QWEN, "512x1x8", f"--mesh.dp_replicate 64 {ALONE}"),
    Case(QWEN, "512x2x4", "--mesh.dp_replicate 64 --mesh.experts dp --mesh.expert_ranks 8"),
    Case(DEEPSEEK, "4x16x8", "", (0, -1)),
    Case(DEEPSEEK, "32x16x8"),
    Case(
        DEEPSEEK,
        "64x16x4",
        "--mesh.dp_replicate 8 --mesh.experts dp_tp --mesh.expert_ranks 8 --mesh.dispatch all_to_all",
    ),
]
DRAWN = [Case(QWEN, "512x1x8", ALONE, (0, -1)), Case(DEEPSEEK, "32x16x8", "", (0, -1))]


def measured(case: Case, rank: int, *more: str) -> dict[str, Any]:
    """What ``python -m moe_dtensor.bench.fake_world`` says of one rank."""
    dp, pp, _ = map(int, case.mesh.split("x"))
    batch = ["--training.global_batch_size", str(dp * (4 * pp if pp > 1 else 1))]
    command = [sys.executable, "-m", "moe_dtensor.bench.fake_world", "--config", f"train_configs/{case.config}.toml"]
    command += ["--mesh", case.mesh, "--rank", str(rank), *more, *case.flags.split(), *batch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {"config": case.config, "flags": case.flags, **json.loads(done.stdout)}
    print(json.dumps(found), flush=True)
    return found


def main(out: Path) -> None:
    """All cases; what is known so far is written after each."""
    result: dict[str, Any] = {**provenance(), "ranks": [], "drawn": []}
    for name, cases, more in (("ranks", CASES, ()), ("drawn", DRAWN, ("--only-plan", "--values"))):
        for case in cases:
            for rank in case.ranks:
                result[name].append(measured(case, rank, *more))
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(tables(result)))


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown: of each world what its slowest rank takes and rank 0's plan; the collectives of rank 0's step; builds
    with values."""
    worlds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["ranks"]:
        worlds.setdefault((row["config"], row["mesh"], row["flags"].replace(ALONE, "").strip()), []).append(row)
    lines = [
        "| config | mesh | other flags | build, s | state and plan of a rank, s | plan of all on rank 0, s (next save) "
        "| parts | index, MiB (s) | step, s | process groups | most resident MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    sent = ["| config | mesh | other flags | collectives of rank 0's step |", "|---|---|---|---|"]
    for (config, mesh, flags), rows in worlds.items():
        first, flags = rows[0], f"`{flags}`" if flags else ""
        seconds = [row["seconds"] for row in rows]
        own = max(x["state"] + x["local plan"] for x in seconds)
        zero = seconds[0]
        cells = [
            f"{max(x['build'] for x in seconds):.1f}",
            f"{own:.1f}",
            f"{zero['plan of all ranks']:.1f} ({zero['the same at the next save']:.1f})",
            f"{first['parts']:,}",
            f"{first['MiB of the index']:.0f} ({zero['index']:.0f})",
            f"{max(x['step'] for x in seconds):.0f}",
            str(max(row["process groups"] for row in rows)),
            f"{max(row['resident MiB'] for row in rows):,}",
        ]
        lines.append(f"| `{config}` | {mesh} | {flags} | {' | '.join(cells)} |")
        calls = ", ".join(f"{name} {count}" for name, count in first["collectives of a step"].items())
        sent.append(f"| `{config}` | {mesh} | {flags} | {calls} |")
    drawn = ["| config | mesh | rank | parameters of the rank | build, s | resident MiB |", "|---|---|---|---|---|---|"]
    for row in result["drawn"]:
        size = f"{row['parameters of the rank']:,}"
        cells = [str(row["rank"]), size, f"{row['seconds']['build']:.0f}", f"{row['resident MiB']:,}"]
        drawn.append(f"| `{row['config']}` | {row['mesh']} | {' | '.join(cells)} |")
    return ["\n".join(table) for table in (lines, sent, drawn)]


if __name__ == "__main__":
    if sys.argv[1] == "--print":
        print("\n\n".join(tables(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))))
    else:
        main(Path(sys.argv[1]))
