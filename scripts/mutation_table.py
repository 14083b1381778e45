"""Break the update, evaluation and checkpoints on purpose, in each dtype, and write what ``verify`` says:
python scripts/mutation_table.py OUT.json

The faults are those of ``tests/verify/test_update_mutations.py``. Prints the table of docs/verify.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_dtensor.bench.measure import provenance  # noqa: E402
from tests.verify.test_update_mutations import DTYPES, MUTATIONS, Expected, verdict_in  # noqa: E402


def judged(expected: Expected, dtype: str) -> dict[str, Any]:
    """What is told of one fault in one dtype."""
    with expected.mutation():
        verdict = verdict_in(dtype, expected.layout, expected.changes)
    worst = verdict.worst
    named = (worst.kind, worst.step) == (expected.kind, expected.step)
    row = {"fault": expected.mutation.__name__, "dtype": dtype, "mesh": expected.layout.mesh}
    row |= {"caught": not verdict.ok, "named": named and not verdict.ok}
    return row | {
        "kind": worst.kind,
        "name": worst.name,
        "step": worst.step,
        "error": worst.error,
        "limit": worst.limit,
    }


def main(out: Path) -> None:
    """All faults in all dtypes, and the library unbroken; what is known so far is written after each."""
    result: dict[str, Any] = {**provenance(), "config": "olmoe_small", "unbroken": {}, "rows": []}
    for dtype in DTYPES:
        result["unbroken"][dtype] = verdict_in(dtype, MUTATIONS[0].layout, {}).ok
        for expected in MUTATIONS:
            result["rows"].append(judged(expected, dtype))
            print(result["rows"][-1], flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result["rows"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each fault, a column for each dtype."""
    lines = [f"| broken on purpose | {' | '.join(DTYPES)} |", f"|{'---|' * (len(DTYPES) + 1)}"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        cells = [row for row in rows if row["fault"] == fault]
        told = [
            f"{row['kind']} {row['error']:.0e} ({row['limit']:.0e})" if row["caught"] else "passes" for row in cells
        ]
        lines.append(f"| {fault.replace('_', ' ')} | {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
