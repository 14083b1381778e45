"""Plots and table of the study of docs/study.md, from its JSON files."""

from __future__ import annotations

import io
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from study_settings import FAMILIES, SETTINGS, Setting

INK = "#6e7781"
"""Of text and axes: as readable on white as on black."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0629a")
"""After Okabe and Ito: told apart by colour-blind eyes, and on white and black alike."""
PANELS = {
    "load_max_over_mean": "busiest expert\n/ mean load",
    "experts_without_tokens": "experts without\ntokens, of 24",
    "load_churn": "churn: share of\ncopies that moved",
    "router_entropy": "router's entropy,\nnats",
}
"""Curves of the balance figure, with their axis labels."""


DASHES = (0, (4, 2))
DIRECTIONS = (
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"),
    (0.8, -0.8, "left", "top"),
    (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
)
"""Of a name from its point, and how it is aligned there."""
Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and values by seed."""
Line = tuple[float | None, str, str]
"""Where a curve ends, its colour and name."""


class Runs:
    """Curves and measurements by setting, all seeds together."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in record["runs"]:
            self.runs.setdefault(run["setting"], []).append(run)
        self.settings = [s for s in SETTINGS if s.key in self.runs]

    def family(self, name: str) -> list[Setting]:
        """Settings of one panel, in order."""
        return [s for s in self.settings if s.family == name]

    def curve(self, key: str, name: str) -> Curve | None:
        """Steps, and values by seed; None for what the setting does not have."""
        curves = [run["curves"].get(name) for run in self.runs.get(key, [])]
        if not curves or not all(curves):
            return None
        return np.array(curves[0][0]), np.array([values for _, values in curves])

    def mean_curve(self, name: str) -> Curve:
        """Of all routers, by seed: what initial values and text do to every one of them is in it."""
        curves = [curve for s in self.settings if s.key != "dense" and (curve := self.curve(s.key, name))]
        seeds = min(len(values) for _, values in curves)
        return curves[0][0], np.mean([values[:seeds] for _, values in curves], axis=0)

    def above_mean(self, key: str) -> np.ndarray:
        """Held-out loss after training above the mean of all routers, by seed."""
        losses = {s.key: self.held_out(s.key, "evaluation", "loss") for s in self.settings}
        seeds = min(map(len, losses.values()))
        return losses[key][:seeds] - np.mean([v[:seeds] for k, v in losses.items() if k != "dense"], axis=0)

    def held_out(self, key: str, routed: str, name: str) -> np.ndarray:
        """One number of the measurement after training, by seed."""
        return np.array([run["held_out"][routed][name] for run in self.runs[key]])


def draw_all(routers: dict[str, Any] | None, sent: dict[str, Any] | None, out: Path) -> None:
    """Every plot that the data at hand allows, as SVG."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.5,
            "svg.hashsalt": "study",
            "savefig.transparent": True,
        }
    )
    if routers and routers["runs"]:
        runs = Runs(routers)
        save(draw_loss(runs), out / "loss.svg")
        save(draw_balance(runs), out / "balance.svg")
        save(draw_held_out(runs), out / "held_out.svg")
        save(draw_scatter(runs), out / "loss_and_load.svg")
    if sent:
        save(draw_bytes(sent), out / "bytes.svg")


def save(figure: Any, path: Path) -> None:
    """Without a date, so that the same data make the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    path.write_text(shrink(text.getvalue()), encoding="utf-8")


def shrink(svg: str) -> str:
    """The same picture in fewer bytes: tenths of a point, each style once, no comments, no indents."""

    def tenths(numbers: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), numbers[0])

    def join(outline: re.Match[str]) -> str:
        return re.sub(r"\s*([MLHVQCZz])\s*", r"\1", outline[0])

    styles: dict[str, str] = {}

    def name(style: re.Match[str]) -> str:
        return f' class="{styles.setdefault(style[1], f"s{len(styles)}")}"'

    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"|translate\([^)]*\)', tenths, svg)
    svg = re.sub(r'(?<= d=")[^"]*', join, svg)
    svg = re.sub(r' style="([^"]*)"', name, svg)
    classes = "".join(f".{short}{{{style}}}" for style, short in styles.items())
    svg = svg.replace("</style>", f"{classes}</style>", 1)
    return "\n".join(line for raw in svg.splitlines() if (line := raw.strip())) + "\n"


def draw_loss(runs: Runs) -> Any:
    """Training loss, and held-out loss above the mean of all routers; a column for each family."""
    import matplotlib.pyplot as plt

    families = [name for name in FAMILIES if runs.family(name)]
    figure, axes = plt.subplots(
        2, len(families), figsize=(2.3 * len(families), 4.6), sharex=True, sharey="row", squeeze=False
    )
    labels = []
    for column, name in enumerate(families):
        top, bottom = axes[:, column]
        lines: list[Line] = []
        bottom.axhline(0, color=INK, linewidth=0.8)
        plain = [Setting("topk", "none", "top-k", "")] if "topk" in runs.runs else []
        for setting, color in zip([*plain, *runs.family(name)], (INK, *COLORS), strict=False):
            draw_curve(top, runs.curve(setting.key, "loss"), color, dashed=color == INK, smooth=2)
            above = difference(runs.curve(setting.key, "validation_loss"), runs.mean_curve("validation_loss"))
            lines.append((draw_curve(bottom, above, color, dashed=color == INK), color, setting.short))
        labels.append((bottom, lines))
        top.set_title(FAMILIES[name], color=INK, fontweight="bold", loc="left")
        bottom.set_xlabel("step")
    axes[0, 0].set_ylim(top=3.3)  # the first steps start above 5
    axes[0, 0].set_ylabel("training loss,\nnats a byte")
    axes[1, 0].set_ylabel("held-out loss above the\nmean of routers, nats a byte")
    finish(axes, labels)
    return figure


def draw_balance(runs: Runs) -> Any:
    """What the routers tell of themselves: a row for each metric, a column for each family."""
    import matplotlib.pyplot as plt

    families = [name for name in FAMILIES if runs.family(name)]
    figure, axes = plt.subplots(
        len(PANELS),
        len(families),
        figsize=(2.3 * len(families), 1.55 * len(PANELS)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    labels = []
    for column, name in enumerate(families):
        for row, metric in enumerate(PANELS):
            axis = axes[row, column]
            plain = draw_curve(axis, runs.curve("topk", metric), INK, dashed=True, smooth=2)
            lines: list[Line] = [
                (draw_curve(axis, runs.curve(setting.key, metric), color, smooth=2), color, setting.short)
                for setting, color in zip(runs.family(name), COLORS, strict=False)
            ]
            if row == 0:
                labels.append((axis, [*lines, (plain, INK, "top-k")]))
        axes[0, column].set_title(FAMILIES[name], color=INK, fontweight="bold", loc="left")
        axes[-1, column].set_xlabel("step")
    for row, label in enumerate(PANELS.values()):
        axes[row, 0].set_ylabel(label)
    finish(axes, labels)
    return figure


def draw_held_out(runs: Runs) -> Any:
    """Held-out loss after training, routed as evaluation and as training routes; settings sorted by the former."""
    import matplotlib.pyplot as plt

    order = sorted(runs.settings, key=lambda s: -runs.held_out(s.key, "evaluation", "loss").mean())
    figure, axis = plt.subplots(figsize=(7.5, 0.32 * len(order) + 0.9))
    for y, setting in enumerate(order):
        evaluated, trained = (runs.held_out(setting.key, routed, "loss") for routed in ("evaluation", "training"))
        axis.plot([evaluated.mean(), trained.mean()], [y, y], color=INK, linewidth=1, alpha=0.6)
        axis.scatter(trained, [y] * len(trained), s=9, color=COLORS[1], alpha=0.6, linewidths=0)
        axis.scatter(evaluated, [y] * len(evaluated), s=9, color=COLORS[0], alpha=0.6, linewidths=0)
        axis.scatter(trained.mean(), y, s=46, facecolors="none", edgecolors=COLORS[1], linewidths=1.6, zorder=3)
        axis.scatter(evaluated.mean(), y, s=30, color=COLORS[0], zorder=4)
    axis.set_yticks(range(len(order)), labels=[setting.label for setting in order])
    axis.set_xlabel("held-out loss after training, nats a byte")
    axis.text(1, 1.02, "as training routes (○)", transform=axis.transAxes, color=COLORS[1], ha="right")
    axis.text(0, 1.02, "as evaluation routes (●)", transform=axis.transAxes, color=COLORS[0])
    axis.grid(axis="both")
    axis.set_axisbelow(True)
    return figure


def draw_scatter(runs: Runs) -> Any:
    """Held-out loss over load, both as evaluation routes; a small dot is a seed."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    colors = dict(zip(FAMILIES, (*COLORS, INK), strict=True))
    points = []
    for setting in runs.settings:
        if setting.key == "dense":
            continue
        x, y = (runs.held_out(setting.key, "evaluation", name) for name in ("load_max_over_mean", "loss"))
        color = colors.get(setting.family, INK)
        axis.scatter(x, y, s=9, color=color, alpha=0.5, linewidths=0)
        axis.scatter(x.mean(), y.mean(), s=36, color=color, zorder=3)
        points.append((x.mean(), y.mean(), color, setting.label))
    axis.set_xlabel("busiest expert / mean load on held-out text, mean of the blocks")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.margins(x=0.17, y=0.06)
    axis.grid()
    axis.set_axisbelow(True)
    label_points(axis, points)
    return figure


def draw_bytes(sent: dict[str, Any]) -> Any:
    """Bytes that a rank sends in a step, by axis; ticks where ``plan`` reckons the sum."""
    import matplotlib.pyplot as plt

    entries = sent["placements"]
    axes_seen = [axis for axis in ("dp", "tp", "dp_tp", "world") if any(by_axis(e, axis) > 1e4 for e in entries)]
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(entries) + 0.9))
    for y, entry in enumerate(reversed(entries)):
        left = 0.0
        for name, color in zip(axes_seen, COLORS, strict=False):
            width = by_axis(entry, name) / 1e6
            axis.barh(y, width, left=left, height=0.62, color=color)
            if width > 1.5:
                axis.text(left + width / 2, y, f"{width:.1f}", color="white", ha="center", va="center", fontsize=8)
            left += width
        planned = sum(entry["planned"].values()) / 1e6
        axis.plot([planned, planned], [y - 0.42, y + 0.42], color=INK, linewidth=2)
        axis.text(max(left, planned) + 0.6, y, f"{left:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(entries)), labels=[f"{e['experts']}, {e['dispatch']}" for e in reversed(entries)])
    axis.set_xlabel("MB that a rank sends in a step (mean of the ranks); tick: reckoned by plan")
    for i, (name, color) in enumerate(zip(axes_seen, COLORS, strict=False)):
        axis.text(0.08 + 0.07 * i, 1.02, name, transform=axis.transAxes, color=color, fontweight="bold")
    axis.text(0, 1.02, "over", transform=axis.transAxes)
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    return figure


def by_axis(entry: dict[str, Any], axis: str) -> float:
    """Measured bytes of one placement over one axis."""
    return sum(count for key, count in entry["measured"].items() if key.split("/")[0] == axis)


def difference(curve: Curve | None, reference: Curve | None) -> Curve | None:
    """Seed by seed: both saw the same batches."""
    if curve is None or reference is None:
        return None
    seeds = min(len(curve[1]), len(reference[1]))
    return curve[0], curve[1][:seeds] - reference[1][:seeds]


def draw_curve(axis: Any, curve: Curve | None, color: str, dashed: bool = False, smooth: int = 1) -> float | None:
    """The mean of the seeds, and the band from the lowest to the highest; the last value.

    Args:
        smooth: points that are averaged into one.
    """
    if curve is None:
        return None
    starts = np.arange(0, len(curve[0]), smooth)
    steps, values = curve[0][np.minimum(starts + smooth, len(curve[0])) - 1], np.add.reduceat(curve[1], starts, axis=1)
    values = values / np.diff([*starts, len(curve[0])])
    axis.plot(steps, values.mean(0), color=color, linewidth=1.4, linestyle=DASHES if dashed else "-")
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    return float(values.mean(0)[-1])


def finish(axes: Any, labels: list[tuple[Any, list[Line]]]) -> None:
    """Grids below the lines, room between panels, and there the lines' names: only now are the scales known."""
    figure = axes.flat[0].figure
    for axis in axes.flat:
        axis.grid()
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
    figure.subplots_adjust(wspace=0.8, hspace=0.16)
    figure.canvas.draw()
    for axis, lines in labels:
        frame, known = axis.get_window_extent(), sorted(line for line in lines if line[0] is not None)
        heights = [(axis.transData.transform((0, value))[1] - frame.y0) / frame.height for value, _, _ in known]
        places = spread(heights, gap=11 * figure.dpi / 72 / frame.height)
        for place, (_, color, text) in zip(places, known, strict=True):
            axis.text(1.03, place, text, transform=axis.transAxes, color=color, fontsize=8, va="center")


def spread(places: list[float], gap: float) -> list[float]:
    """Sorted places, moved as little as needs be to stand ``gap`` apart and not below 0."""
    groups: list[tuple[float, int]] = []  # mean, members

    def floor(mean: float, count: int) -> tuple[float, int]:
        return max(mean, gap * (count - 1) / 2), count

    for place in places:
        groups.append(floor(place, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (mean, count), (below, fewer) = groups.pop(), groups.pop()
            groups.append(floor((mean * count + below * fewer) / (count + fewer), count + fewer))
    return [mean + gap * (i - (count - 1) / 2) for mean, count in groups for i in range(count)]


def label_points(axis: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside points, as near as no point and no other name is in the way; with a line where that is not near."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axis.figure.canvas.draw()
    renderer, frame = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform([p[:2] for p in points])]
    for x, y, color, text in points:
        for distance, (right, up, across, along) in product((7, 20, 34, 50), DIRECTIONS):
            label = axis.annotate(
                text,
                (x, y),
                (right * distance, up * distance),
                textcoords="offset points",
                color=color,
                fontsize=8,
                ha=across,
                va=along,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3}
                if distance > 7
                else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # of the words alone, without the line
            inside = frame.containsx(box.x0) and frame.containsx(box.x1) and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def table(routers: dict[str, Any]) -> list[str]:
    """Markdown: a line for each setting, lowest held-out loss first; means of the seeds."""
    runs = Runs(routers)
    lines = [
        "| routing | held-out loss | routed as in training | above the mean of routers (lowest to highest seed) "
        "| busiest / mean | in training | cv | in training | without tokens | differs from top-k | dropped |",
        "|---|" + "---|" * 10,
    ]
    for setting in sorted(runs.settings, key=lambda s: runs.held_out(s.key, "evaluation", "loss").mean()):
        both = ("evaluation", "training")
        evaluated, trained = (runs.held_out(setting.key, routed, "loss") for routed in both)
        above = runs.above_mean(setting.key)
        cells = [setting.label, f"{evaluated.mean():.3f}", f"{trained.mean():.3f}"]
        cells.append(f"{above.mean():+.3f} ({above.min():+.3f} to {above.max():+.3f})")
        if setting.key == "dense":
            cells += ["–"] * 7
        else:
            for name in ("load_max_over_mean", "load_cv"):
                cells += [f"{runs.held_out(setting.key, routed, name).mean():.2f}" for routed in both]
            cells.append(f"{runs.held_out(setting.key, 'evaluation', 'experts_without_tokens').mean():.1f}")
            for name in ("differs_from_top_k", "dropped"):
                share = runs.held_out(setting.key, "training", name).mean()
                cells.append(f"{share:.1%}" if share else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
