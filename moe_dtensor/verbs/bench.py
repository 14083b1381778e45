"""``bench layer`` and ``bench train``: how fast, beside how right."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load_variants
from moe_dtensor.config.resolve import resolve

HELP = "time the expert layer (bench layer) or whole training steps (bench train)"


def main(argv: list[str]) -> int:
    """Run the benchmark that the first word names; 1 if a backend gave a wrong answer."""
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what == "layer":
        return _layer(rest)
    if what == "train":
        return _train(rest)
    if what in ("-h", "--help"):
        print("usage: python -m moe_dtensor bench {layer,train} [options]; each has --help")
        return 0
    raise ConfigError(f"bench: {what or 'nothing'} cannot be timed.", "Write bench layer or bench train.")


def _layer(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_dtensor bench layer", description="one MoE layer, forward and backward, on one device"
    )
    shapes = ["mixtral", "olmoe", "qwen3_30b", "neox125m"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="NAME", help="or T,D,F,E,K,activation")
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="default: all, and installed peers")
    parser.add_argument("--skew", default="0", choices=("0", "zipf"), help="of the routing")
    parser.add_argument("--json", metavar="OUT", help="also write the results to a file")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run backends and peers by torch.compile, as training does (default: on CUDA)",
    )
    options = parser.parse_args(argv)
    from moe_dtensor.bench.layer import bench_layer

    try:
        results = bench_layer(options.shapes, options.backends, options.skew, options.json, options.compile)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 1 if any(result.failure for result in results) else 0


def _train(argv: list[str]) -> int:
    parser = Parser("bench train", "time whole training steps of a config (under torchrun for several ranks)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts (default: 5)")
    parser.add_argument("--measure", type=int, default=10, help="steps that are timed (default: 10)")
    parser.add_argument("--variants", type=Path, metavar="F", help="a TOML: a table of changed keys for each variant")
    parser.add_argument("--breakdown", action="store_true", help="also record where the GPUs' time goes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to a file")
    options, config = parser.load(argv)
    if min(options.warmup, options.measure) < 1:
        raise ConfigError(f"--warmup {options.warmup} and --measure {options.measure} must be at least 1.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    variants = load_variants(options.variants, config) if options.variants else {"": config}
    for variant in variants.values():
        check(variant, world_size)
    from moe_dtensor.bench.train import Options, bench_train

    resolved = {name: resolve(variant, world_size) for name, variant in variants.items()}
    return bench_train(resolved, Options(options.warmup, options.measure, options.breakdown, options.json))
