"""Plots of ``bench train --variants --breakdown``: where a step goes on each rank, and memory beside the plan's.

    python scripts/plot_bench.py docs/results/h100x2_train_olmoe_small.json docs/figures/two_gpus
        [--one docs/results/h100x1_train_olmoe_small.json]

Writes ``<out>_time.svg`` and ``<out>_memory.svg``. Needs the extra ``study`` (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parent))
from bench_table import planned_gib

COLOURS = {
    "computing": "#4477aa",
    "all_gather": "#ee6677",
    "reduce_scatter": "#ccbb44",
    "all_reduce": "#aa3377",
    "send_receive": "#66ccee",
    "idle": "#bbbbbb",
}
"""Paul Tol's bright scheme: told apart by colour-blind readers too."""
GREY = "#808080"
"""Of text and axes: legible on white and on black."""


def main() -> None:
    """Read the results, write the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--one", type=Path, help="the same config on one GPU")
    options = parser.parse_args()
    records = json.loads(options.results.read_text())["variants"]
    if options.one:
        records.insert(0, json.loads(options.one.read_text()) | {"name": "one_gpu"})
    plt.rcParams.update(
        {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
        | {"font.size": 9, "svg.fonttype": "none"}
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, draw in (("time", draw_time), ("memory", draw_memory)):
        figure, axes = plt.subplots(figsize=(8.5, 0.9 + 0.42 * len(records)), layout="constrained")
        draw(axes, records)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(f"{options.out}_{name}.svg", transparent=True, metadata={"Date": None})


def draw_time(axes: Axes, records: list[dict[str, Any]]) -> None:
    """A bar for each rank: computing, collectives that nothing hides, idle; in milliseconds of a recorded step."""
    labelled: set[str] = set()
    for row, record in enumerate(records):
        for rank, breakdown in enumerate(record["breakdown"]):
            place, left = row + 0.36 * (rank - (len(record["breakdown"]) - 1) / 2), 0.0
            exposed = sum(breakdown["exposed_collectives"].values()) or 1.0
            # Two kinds may be exposed at the same time: shared out so that the bar is the step.
            share = breakdown["exposed"] / exposed
            parts = {kind: ms * share for kind, ms in breakdown["exposed_collectives"].items()}
            for kind, ms in {"computing": breakdown["computing"], **parts, "idle": breakdown["idle"]}.items():
                label = kind.replace("_", "-") if kind not in labelled else None
                labelled.add(kind)
                axes.barh(place, ms, 0.32, left, color=COLOURS.get(kind, "#228833"), label=label)
                left += ms
        rate = record["result"]["tokens_per_second"]
        end = max(breakdown["step"] for breakdown in record["breakdown"])
        axes.text(end + 10, row, f"{rate / 1e3:.0f}k tokens/s", va="center")
    _name_rows(axes, records)
    axes.set_xlabel("milliseconds of a recorded step, a bar for each rank (recording slows a step by some per cent)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, ncols=6)
    axes.margins(x=0.16)


def draw_memory(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Peak memory of the fullest rank: measured, and as ``plan`` reckons it."""
    for row, record in enumerate(records):
        measured = record["result"]["peak_memory_gib"]
        planned = planned_gib(record)
        axes.barh(row - 0.18, measured, 0.32, color=COLOURS["computing"], label=None if row else "measured")
        axes.barh(row + 0.18, planned, 0.32, color=COLOURS["all_gather"], label=None if row else "planned")
        axes.text(max(measured, planned) + 0.5, row, f"{measured:.1f} GiB, {planned / measured - 1:+.1%}", va="center")
    _name_rows(axes, records)
    axes.set_xlabel("GiB, peak of tensors on the fullest rank")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, ncols=2)
    axes.margins(x=0.2)


def _name_rows(axes: Axes, records: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(records)), [record["name"].replace("_", " ") for record in records])
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
