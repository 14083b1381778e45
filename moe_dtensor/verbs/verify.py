"""``verify``: does every mesh compute the gradients of one plain process?"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from moe_dtensor.config.build import override
from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Schedule

if TYPE_CHECKING:
    from moe_dtensor.verify.compare import Verdict
    from moe_dtensor.verify.miniature import Layout

HELP = "prove on a miniature of a config that every mesh computes the same gradients"
DEFAULT_MESHES = ("1x1x1", "2x1x1", "1x1x2", "1x1x4", "1x1x8", "2x1x2", "1x2x2", "2x2x2", "1x3x2")
DTYPES = ("float64", "float32", "bfloat16")
BACKENDS = ("auto", "reference", "torch", "triton", "grouped_gemm")


def main(argv: list[str]) -> int:
    """Print a table, a row for each mesh and schedule; 1 if any differs from the oracle, else 0."""
    parser = Parser("verify", HELP)
    parser.add_argument("--meshes", nargs="+", metavar="DPxPPxTP", help=f"default: {' '.join(DEFAULT_MESHES)}")
    parser.add_argument("--schedules", nargs="+", metavar="NAME", help="for meshes with pp > 1; default: the config's")
    parser.add_argument("--dtype", default="float64", choices=DTYPES, help="computation; default: float64")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="expert kernels; default: the config's in bfloat16, else auto"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the verdicts to a file")
    options, config = parser.load(argv)
    config = _with_backend(config, options)

    # Counting GPUs must not start CUDA here: where there are too few, CPU ranks are forked from this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from moe_dtensor.verify.miniature import shrink

    layouts, refused = choose_layouts(config, options.meshes, options.schedules)
    miniature = shrink(config, layouts, options.dtype)
    verdicts = _judge(miniature, layouts, options)
    for mesh, reason in refused.items():
        print(f"{mesh} not run: {reason}")
    if options.json:
        texts = [v.to_json() | {"dtype": options.dtype, "backend": miniature.moe.backend} for v in verdicts]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")
    return 0 if all(v.ok for v in verdicts) else 1


def _with_backend(config: Config, options: argparse.Namespace) -> Config:
    backend = options.backend or (config.moe.backend if options.dtype == "bfloat16" else "auto")
    return override(config, {"moe.backend": backend})


def choose_layouts(
    config: Config, meshes: Sequence[str] | None, schedules: Sequence[str] | None
) -> tuple[list[Layout], dict[str, str]]:
    """The meshes and schedules to run, and why default ones are left out.

    Raises:
        ConfigError: a mesh or schedule that was asked for is not one, or does not accept the config.
    """
    from moe_dtensor.verify.miniature import Layout, legal

    known = get_args(Schedule)
    for schedule in schedules or ():
        if schedule not in known:
            raise ConfigError(f"--schedules {schedule}: no such schedule.", f"Choose among {', '.join(known)}.")
    layouts, refused = [], {}
    for mesh in meshes or DEFAULT_MESHES:
        dp, pp, tp = _parse_mesh(mesh)
        for schedule in (schedules or (config.pipeline.schedule,)) if pp > 1 else ("none",):
            layout = Layout(dp, pp, tp, schedule)
            if layout in layouts:
                continue
            if meshes or legal(config, [layout]):
                layouts.append(layout)
            else:
                refused[f"{mesh} {schedule}" if pp > 1 else mesh] = _reason(config, layout)
    return layouts, refused


def _parse_mesh(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--meshes {text}: not a mesh.", "Write DPxPPxTP, such as 2x1x4.")
    dp, pp, tp = map(int, match.groups())
    return dp, pp, tp


def _reason(config: Config, layout: Layout) -> str:
    try:
        layout.place(config)
    except ConfigError as error:
        return error.problem
    return ""


def _judge(miniature: Config, layouts: Sequence[Layout], options: argparse.Namespace) -> list[Verdict]:
    from moe_dtensor.verify.cases import Case
    from moe_dtensor.verify.miniature import steps_to_show
    from moe_dtensor.verify.report import Report
    from moe_dtensor.verify.run import prove

    cases = [Case(layout, miniature, steps=steps_to_show(miniature)) for layout in layouts]
    verdicts = []
    with Report(miniature, options.dtype) as report:
        for verdict in prove(cases):
            report.add(verdict)
            verdicts.append(verdict)
    return verdicts
