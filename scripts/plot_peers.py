"""The README's picture: this package beside torchtitan, from results of ``bench layer`` and ``bench train --peers``.

    python scripts/plot_peers.py docs/figures/beside_torchtitan.svg --layer docs/results/h100_layer_uniform.json
        [--train docs/results/h100_peers_olmoe_small.json ...]

A pair of panels for each kind of result: speed, and memory. Needs the extra ``study`` (matplotlib).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"moe_dtensor": "#4477aa", "torchtitan": "#ee6677"}
"""Told apart by colour-blind readers too."""
GREY = "#808080"
"""Of text and axes: legible on white and on black."""


@dataclass(frozen=True)
class Pair:
    """One size, measured with both."""

    name: str
    speed: tuple[float, float]
    """Ours, theirs."""
    memory: tuple[float, float]
    """GiB."""


def main() -> None:
    """Read the results, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=Path, help="of bench layer")
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="of bench train --peers")
    options = parser.parse_args()
    kinds = []
    if options.train:
        records = {path.stem: json.loads(path.read_text()) for path in options.train}
        kinds.append(("training, thousand tokens/s", "GiB", train_pairs(records)))
    if options.layer:
        kinds.append(("expert layer, TFLOP/s", "peak GiB", layer_pairs(json.loads(options.layer.read_text()))))
    if not kinds:
        parser.error("name a result: --layer or --train")
    draw(options.out, kinds)


def train_pairs(records: dict[str, dict[str, Any]]) -> list[Pair]:
    """Of each result, ours and the fastest peer that fitted."""
    pairs = []
    for stem, record in ((stem, with_peers(record)) for stem, record in records.items()):
        ours = record["result"]
        fitted = [peer["result"] for peer in record.get("peers", []) if peer["result"]]
        if not fitted:
            raise SystemExit(f"error: {stem} has no peer's result. Make it with bench train --peers.")
        theirs = max(fitted, key=lambda result: result["tokens_per_second"])
        speed = (ours["tokens_per_second"] / 1e3, theirs["tokens_per_second"] / 1e3)
        name = Path(record["config"]["run"]["folder"]).name or stem
        name += f", {record['ranks']} GPUs" if record.get("ranks", 1) > 1 else ""
        pairs.append(Pair(name, speed, (ours["peak_memory_gib"], theirs["peak_memory_gib"])))
    return pairs


def with_peers(result: dict[str, Any]) -> dict[str, Any]:
    """Of a result's variants the one that peers were trained beside."""
    return next((record for record in result.get("variants", []) if record.get("peers")), result)


def layer_pairs(record: dict[str, Any]) -> list[Pair]:
    """Of each shape that torchtitan has (gated ones), what ``auto`` takes on such a card, and torchtitan's layer."""
    by_shape: dict[str, dict[str, dict[str, Any]]] = {}
    for result in record["results"]:
        if result["tflops"] and result["shape"]["activation"] == "swiglu":
            by_shape.setdefault(result["shape"]["name"], {})[result["backend"]] = result
    return [
        Pair(name, (ours["tflops"], theirs["tflops"]), (ours["peak_mib"] / 1024, theirs["peak_mib"] / 1024))
        for name, results in by_shape.items()
        if (ours := results.get("triton")) and (theirs := results.get("torchtitan"))
    ]


def draw(out: Path, kinds: list[tuple[str, str, list[Pair]]]) -> None:
    """A row of panels for each kind: speed left, memory right."""
    plt.rcParams.update(
        {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
        | {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "moe_dtensor"}
    )
    heights = [0.7 + 0.55 * len(pairs) for *_, pairs in kinds]
    figure, grid = plt.subplots(
        len(kinds), 2, figsize=(8.5, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for (speed, memory, pairs), (left, right) in zip(kinds, grid, strict=True):
        panel(left, speed, [(pair.name, pair.speed) for pair in pairs])
        panel(right, memory, [(pair.name, pair.memory) for pair in pairs])
        right.set_yticklabels([])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, transparent=True, metadata={"Date": None})


def panel(axes: Axes, label: str, rows: list[tuple[str, tuple[float, float]]]) -> None:
    """Two bars for each row, with their numbers."""
    for place, (_, values) in enumerate(rows):
        for shift, value, (who, colour) in zip((-0.19, 0.19), values, COLOURS.items(), strict=True):
            axes.barh(place + shift, value, 0.34, color=colour, label=None if place else who)
            text = f"{value:.0f}" if value >= 20 else f"{value:.1f}"
            axes.text(value, place + shift, f" {text}", va="center")
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
