"""``verify``: does every mesh compute the gradients of one plain process?"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moe_dtensor.config.command_line import Parser, write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load_variants, override
from moe_dtensor.config.schema import Config, Schedule

if TYPE_CHECKING:
    from moe_dtensor.verify.miniature import Case, Layout
    from moe_dtensor.verify.verdict import Verdict

HELP = "prove on a miniature of a config that every mesh computes the same gradients"
DEFAULT_MESHES = ("1x1x1", "2x1x1", "1x1x2", "1x1x4", "1x1x8", "2x1x2", "1x2x2", "2x2x2", "1x3x2")
DTYPES = ("float64", "float32", "bfloat16")
BACKENDS = ("auto", "reference", "torch", "triton", "grouped_gemm", "quack")


def main(argv: list[str]) -> int:
    """Print a table, a row for each mesh and schedule; 1 if any differs from the oracle, else 0."""
    if any(word == "--hf" or word.startswith("--hf=") for word in argv):
        return _verify_folder(argv)
    if any(word.partition("=")[0] == "--against" for word in argv):
        return _against(argv)
    options, config = _parser().load(with_config_of_run(argv))
    if options.stamp is not None and (options.fuzz is not None or options.variants):
        raise ConfigError("--stamp is the verdict on one config.", "Leave out --fuzz and --variants.")
    if options.fuzz is not None:
        return _fuzz(options, config)
    variants = load_variants(options.variants, config) if options.variants else {"": config}

    # Counting GPUs must not start CUDA here: where there are too few, CPU ranks are forked from this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from moe_dtensor.verify.miniature import judged, shrink, whole_case
    from moe_dtensor.verify.run import computation
    from moe_dtensor.verify.verdict import write_record

    cases: list[tuple[str, Case]] = []
    for name, variant in variants.items():
        chosen = _with_backend(variant, options)
        layouts, refused = choose_layouts(chosen, options.meshes, options.schedules)
        if options.exact:
            miniature = judged(chosen, options.dtype, options.compiled)
        else:
            miniature = shrink(chosen, layouts, options.dtype, options.compiled)
        cases += [(name, whole_case(layout, miniature)) for layout in layouts]
        for mesh, reason in refused.items():
            print(f"{f'{name} ' if name else ''}{mesh} not run: {reason}")
    cases, degenerate = _distinct(cases, computation)
    for name, same in degenerate.items():
        print(f"{name} not run: the same computation as {same}")
    # Cases on the same mesh share one start of its ranks.
    order = list(dict.fromkeys(case.layout.mesh for _, case in cases))
    cases.sort(key=lambda named: order.index(named[1].layout.mesh))
    verdicts = _judge(cases, options.dtype)
    print(f"{sum(v.ok for v in verdicts)} of {len(verdicts)} distinct computations agree with the oracle")
    if options.json:
        write_record(options.json, verdicts, cases, options.compiled)
    if options.stamp is not None:
        _stamp(options, config, verdicts, cases[0][1].config)
    return 0 if all(v.ok for v in verdicts) else 1


def _parser() -> Parser:
    parser = Parser("verify", HELP)
    parser.add_argument("--against", metavar="FILE", help="judge a step file of any trainer; needs no --config")
    parser.add_argument("--meshes", nargs="+", metavar="DPxPPxTP", help=f"default: {' '.join(DEFAULT_MESHES)}")
    parser.add_argument("--schedules", nargs="+", metavar="NAME", help="for meshes with pp > 1; default: the config's")
    parser.add_argument("--dtype", default="float64", choices=DTYPES, help="computation; default: float64")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="expert kernels; default: the config's in bfloat16, else auto"
    )
    parser.add_argument("--compiled", action="store_true", help="compile blocks first, which takes long on CPUs")
    parser.add_argument("--variants", type=Path, metavar="F", help="a TOML: a table of changed keys for each variant")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the verdicts to a file")
    parser.add_argument("--hf", metavar="DIR", help="instead: the transformers model in a folder, without --config")
    parser.add_argument("--exact", action="store_true", help="judge the config at its own size, as it is")
    parser.add_argument(
        "--fuzz",
        type=int,
        metavar="N",
        help="judge N configs drawn from the whole schema, on meshes drawn from --meshes",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --fuzz; default: 0")
    parser.add_argument(
        "--stamp",
        nargs="?",
        const="",
        metavar="RUN",
        help="leave the verdict in a run's folder, for its checkpoints to carry; default: the config's run.folder",
    )
    return parser


def with_config_of_run(argv: list[str]) -> list[str]:
    """The command line, with the run's own config where ``--stamp RUN`` names the run and nothing the config."""
    if any(word.partition("=")[0] == "--config" for word in argv):
        return argv
    for i, word in enumerate(argv):
        name, _, run = word.partition("=")
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        run = run or ("" if following.startswith("--") else following)
        if name == "--stamp" and run:
            if not (Path(run) / "config.toml").is_file():
                raise ConfigError(
                    f"--stamp {run}: the folder holds no config.toml of a run.", "Name the config with --config F."
                )
            return [*argv, "--config", str(Path(run) / "config.toml")]
    return argv


def _stamp(options: argparse.Namespace, config: Config, verdicts: Sequence[Verdict], judged: Config) -> None:
    from moe_dtensor.verify.stamp import write_stamp

    how = {"dtype": options.dtype, "backend": judged.moe.backend, "compiled": options.compiled, "exact": options.exact}
    folder = Path(options.stamp) if options.stamp else Path(config.run.folder)
    print(f"stamp: {write_stamp(folder, config, verdicts, how)}; checkpoints saved from now on carry it")


def _verify_folder(argv: list[str]) -> int:
    """The same for the transformers model in a folder: a row for each dtype."""
    parser = Parser("verify", HELP, needs_config=False)
    parser.add_argument("--hf", type=Path, metavar="DIR", required=True, help="a Hugging Face folder, without --config")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="default: both, one after the other")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the verdicts to a file")
    options = parser.parse_args(argv)
    from moe_dtensor.verify.hugging_face import report

    return report(options.hf, [options.dtype] if options.dtype else ["float32", "float64"], options.json)


def _distinct(
    cases: list[tuple[str, Case]], computation: Callable[[Case], str]
) -> tuple[list[tuple[str, Case]], dict[str, str]]:
    """The cases without those that compute what an earlier one does, and those, with the earlier one's name."""
    first: dict[str, str] = {}
    kept, same = [], {}
    for name, case in cases:
        told = " ".join(word for word in (case.layout.mesh, case.layout.schedule, name) if word and word != "none")
        earlier = first.setdefault(computation(case), told)
        if earlier == told:
            kept.append((name, case))
        else:
            same[told] = earlier
    return kept, same


def _against(argv: list[str]) -> int:
    """Say whether the step in a file is the oracle's; 1 if not."""
    parser = Parser("verify", HELP, needs_config=False)
    parser.add_argument("--against", type=Path, required=True, metavar="FILE", help="a step file")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the verdict to a file")
    options = parser.parse_args(argv)
    from moe_dtensor.verify.step_file import explain, judge_step, read_step_file

    step = read_step_file(options.against)
    verdict = judge_step(step)
    worst = explain(step, verdict)
    for line in worst[:12]:
        print(line)
    if len(worst) > 12:
        print(f"… and {len(worst) - 12} more")
    outcome = f"{len(worst)} of {len(verdict.deviations)} quantities differ" if worst else "agrees with the oracle"
    print(f"{step.trainer}, {step.dtype}: {outcome}")
    if options.json:
        write_json(options.json, verdict.to_json() | {"differ": worst})
    return 0 if verdict.ok else 1


def _fuzz(options: argparse.Namespace, config: Config) -> int:
    if options.fuzz < 1:
        raise ConfigError(f"--fuzz {options.fuzz}: no number of cases.", "Give 1 or more.")
    unused = {"--dtype": options.dtype != "float64", "--backend": options.backend, "--compiled": options.compiled}
    unused |= {"--variants": options.variants, "--exact": options.exact, "--stamp": options.stamp is not None}
    if any(unused.values()):
        names = ", ".join(name for name, given in unused.items() if given)
        raise ConfigError(f"--fuzz with {names}: drawn configs are judged in float64, as they are.", "Leave them out.")
    _check_schedules(options.schedules)
    meshes = [_parse_mesh(mesh) for mesh in options.meshes or ()]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from moe_dtensor.bench.measure import provenance
    from moe_dtensor.verify.fuzz import MESHES, draws, fuzz

    def say(line: str) -> None:
        print(line, flush=True)

    def keep(result: dict[str, Any]) -> None:
        if options.json:
            write_json(options.json, rests_on | result)

    rests_on = provenance() | {"seed": options.seed}
    drawn = draws(options.seed, meshes=meshes or MESHES, schedules=options.schedules or get_args(Schedule))
    result = fuzz(options.fuzz, drawn, options.config, config, say, keep)
    kinds = dict(Counter(f["kind"] for f in result["failures"]))
    print(f"{result['cases']} cases, {result['distinct']} distinct, {result['failed']} failed {kinds or ''}")
    return 1 if result["failed"] else 0


def _with_backend(config: Config, options: argparse.Namespace) -> Config:
    if options.dtype != "bfloat16":
        return override(config, {"moe.backend": options.backend or "auto"})
    # Some backends take nothing else, whatever the config itself computes in.
    return override(config, {"moe.backend": options.backend or config.moe.backend, "training.param_dtype": "bfloat16"})


def choose_layouts(
    config: Config, meshes: Sequence[str] | None, schedules: Sequence[str] | None
) -> tuple[list[Layout], dict[str, str]]:
    """The meshes and schedules to run, and why default ones are left out.

    Raises:
        ConfigError: a mesh or schedule that was asked for is not one, or does not accept the config.
    """
    from moe_dtensor.verify.miniature import Layout, legal

    _check_schedules(schedules)
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


def _check_schedules(schedules: Sequence[str] | None) -> None:
    known = get_args(Schedule)
    for schedule in schedules or ():
        if schedule not in known:
            raise ConfigError(f"--schedules {schedule}: no such schedule.", f"Choose among {', '.join(known)}.")


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


def _judge(cases: Sequence[tuple[str, Case]], dtype: str) -> list[Verdict]:
    from moe_dtensor.verify.run import prove
    from moe_dtensor.verify.verdict import Report

    verdicts = []
    with Report(cases[0][1].config, dtype) as report:
        for (name, _), verdict in zip(cases, prove([case for _, case in cases]), strict=True):
            report.add(replace(verdict, mesh=f"{verdict.mesh} {name}".strip()))
            verdicts.append(verdict)
    return verdicts
