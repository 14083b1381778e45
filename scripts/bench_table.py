"""A Markdown table of ``bench train --variants``: speed, what of it several GPUs keep, exposed traffic, memory; or of
``bench train --peers``: ours and theirs.

python -m moe_dtensor bench train --config F --variants V --breakdown --json OUT
python scripts/bench_table.py OUT [--one ONE.json]
python scripts/bench_table.py --peers ONE.json TWO.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moe_dtensor.verbs.plan import make_plan
from moe_dtensor.verbs.plan_search import config_of

HEAD = ("variant", "tokens/s", "of N times one GPU", "MFU", "exposed ms, each rank", "idle ms", "peak GiB", "planned")


def table(records: list[dict[str, Any]], one: float | None = None) -> str:
    """A row for each variant.

    Args:
        records: ``variants`` of a result.
        one: tokens/s of one GPU, for the third column.
    """
    rows = [HEAD, ("---",) * len(HEAD), *(row(record, one) for record in records)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(record: dict[str, Any], one: float | None) -> tuple[str, ...]:
    """The cells of a variant; a dash where a result does not tell."""
    result, ranks = record["result"], record.get("breakdown", [])
    speed, memory = result["tokens_per_second"], result["peak_memory_gib"]
    return (
        f"`{record['name']}`",
        f"{speed:,.0f}",
        f"{speed / (record['ranks'] * one):.1%}" if one else "–",
        f"{result['mfu']:.1%}" if result["mfu"] else "–",
        ", ".join(f"{rank['exposed']:.0f}" for rank in ranks) or "–",
        ", ".join(f"{rank['idle']:.0f}" for rank in ranks) or "–",
        f"{memory:.1f}" if memory else "–",
        f"{planned_gib(record) / memory - 1:+.1%}" if memory else "–",
    )


def peers_table(results: list[dict[str, Any]]) -> str:
    """Of each record with peers a row for us and for each peer that fitted."""
    rows = [("GPUs", "", "tokens/s", "MFU", "peak GiB of each"), ("---",) * 5]
    records = [record for result in results for record in result.get("variants", [result])]
    for record in (record for record in records if "peers" in record):
        answers = [("moe_dtensor", record["result"])]
        answers += [(f"{peer['name']} {peer['version']}", peer["result"]) for peer in record["peers"] if peer["result"]]
        rows += [
            (
                f"{record['ranks']}",
                name,
                f"{result['tokens_per_second']:,.0f}",
                f"{result['mfu']:.1%}",
                f"{result['peak_memory_gib']:.1f}",
            )
            for name, result in answers
        ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def planned_gib(record: dict[str, Any]) -> float:
    """The peak that ``plan`` reckons for a record's config."""
    return make_plan(config_of(record), record["ranks"]).balanced[1].peak / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--peers", type=Path, nargs="+", help="results of bench train --peers")
    parser.add_argument("--one", type=Path, help="the same config on one GPU")
    options = parser.parse_args()
    if (options.results is None) == (options.peers is None):
        parser.error("name a result, or --peers and theirs")
    if options.peers:
        print(peers_table([json.loads(path.read_text()) for path in options.peers]))
        return
    one = json.loads(options.one.read_text())["result"]["tokens_per_second"] if options.one else None
    print(table(json.loads(options.results.read_text())["variants"], one))


if __name__ == "__main__":
    main()
