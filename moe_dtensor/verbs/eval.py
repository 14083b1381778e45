"""``eval``: perplexity and bits per byte of texts, multiple choice, and lm-eval's tasks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from moe_dtensor.config.command_line import Parser, read_world_size, split_overrides
from moe_dtensor.config.errors import ConfigError

HELP = "score texts, multiple choice and lm-eval's tasks with a model (under torchrun for several ranks)"


def main(argv: list[str]) -> int:
    """Print what was measured, and write it where --json says."""
    own, overrides = split_overrides(argv)
    options = _parse(own)
    data, choices = _named("--data", options.data), _named("--multiple-choice", options.multiple_choice)

    from moe_dtensor.evaluate.run import Wanted, measure, prepare
    from moe_dtensor.generate.load import find_source, load_model
    from moe_dtensor.train.ranks import end_ranks, start_ranks

    source = find_source(options.checkpoint, overrides, read_world_size(1))
    max_length = options.max_length or source.max_length
    stride = options.stride or max_length
    if stride > max_length:
        raise ConfigError(
            f"--stride {stride} is above the {max_length} tokens that the model sees: tokens would be left out.",
            f"Give {max_length} or less, or raise --max-length.",
        )
    wanted = Wanted(
        data,
        {name: Path(path) for name, path in choices.items()},
        options.lm_eval,
        options.lm_eval_tasks,
        options.batch_size,
        options.limit,
        options.num_fewshot,
    )
    # All that can be wrong is told before a weight is read.
    prepared = prepare(wanted, source, max_length, stride)
    device = start_ranks(source.config)
    is_rank_0 = os.environ["RANK"] == "0"
    report = measure(load_model(source, device), wanted, prepared, str(options.checkpoint), is_rank_0)
    if is_rank_0:
        report.show()
        if options.json:
            report.write(options.json)
    end_ranks()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("eval", f"{HELP}. --table.key value changes the config, such as --mesh.tp 4.", needs_config=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run, a checkpoint, or a Hugging Face folder"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="texts (a file, a folder or a glob, as data.path): perplexity and bits per byte",
    )
    parser.add_argument(
        "--multiple-choice",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE.jsonl",
        help='lines of {"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER}',
    )
    parser.add_argument(
        "--lm-eval", nargs="+", action="extend", default=[], metavar="TASK", help="tasks of lm-eval (the extra eval)"
    )
    parser.add_argument("--lm-eval-tasks", type=Path, metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of lm-eval's tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each of lm-eval's tasks; default: all")
    parser.add_argument(
        "--max-length", type=int, default=0, metavar="N", help="tokens seen at once; default: as the model was made for"
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens by which the window over a long document moves on; default: all of it, as lm-eval does",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="requests at once, over all ranks; default: 16"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write what was measured to this file")
    options = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("max_length", 0), ("stride", 0), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} makes no sense.", f"Give {least} or more.")
    if not (options.data or options.multiple_choice or options.lm_eval):
        raise ConfigError("eval has nothing to measure.", "Give --data, --multiple-choice or --lm-eval.")
    if options.lm_eval_tasks and not options.lm_eval_tasks.is_dir():
        raise ConfigError(f"--lm-eval-tasks {options.lm_eval_tasks} is no folder.", "Give one that holds task files.")
    if options.json and options.json.is_dir():
        raise ConfigError(f"--json {options.json} is a folder.", "Give the name of a file.")
    return options


def _named(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` words as a dict."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{option} {pair} is not NAME=FILE.", f"Write {option} books=books.jsonl.")
        if name in named:
            raise ConfigError(f"{option} has the name {name!r} twice.", "Give each a name of its own.")
        named[name] = path
    return named
