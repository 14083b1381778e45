"""The README's table is that of the results, as the script makes it."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.bench_table import peers_table

RESULTS = [Path(f"docs/results/{name}_peers_olmoe_small.json") for name in ("h200", "h200x2")]


def test_the_readmes_table_is_that_of_the_records() -> None:
    results = [json.loads(path.read_text()) for path in RESULTS]
    made = peers_table(results)
    assert made in Path("README.md").read_text()
    assert made.count("\n") == 5, "a head, a rule, and two rows for one GPU and for two"


def test_a_result_with_variants_and_a_peer_that_did_not_fit() -> None:
    ours = {"tokens_per_second": 2000.0, "mfu": 0.5, "peak_memory_gib": 1.25}
    peer = {"name": "other", "version": "1", "result": None}
    made = peers_table([{"variants": [{"ranks": 2, "result": ours, "peers": [peer]}, {"ranks": 2, "result": ours}]}])
    assert made.splitlines()[2:] == ["| 2 | moe_dtensor | 2,000 | 50.0% | 1.2 |"]
