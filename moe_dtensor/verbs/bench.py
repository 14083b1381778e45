"""``bench layer``, ``attention``, ``train``, ``transformers`` and ``generate``: how fast, beside how right."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import Parser, read_world_size
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load_variants
from moe_dtensor.config.resolve import resolve

HELP = "time parts, steps and generation (bench layer|attention|train|transformers|generate)"


def main(argv: list[str]) -> int:
    """Run the benchmark that the first word names; 1 if a backend gave a wrong answer."""
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    benches = {
        "layer": _layer,
        "attention": _attention,
        "train": _train,
        "transformers": _transformers,
        "generate": _generate,
    }
    if what in benches:
        return benches[what](rest)
    if what in ("-h", "--help"):
        print(f"usage: python -m moe_dtensor bench {{{','.join(benches)}}} [options]; each has --help")
        return 0
    names = ", ".join(f"bench {name}" for name in benches)
    raise ConfigError(f"bench: {what or 'nothing'} cannot be timed.", f"Write one of {names}.")


def _layer(argv: list[str]) -> int:
    parser = Parser(
        "bench layer",
        "one MoE layer, forward and backward, on one device",
        needs_config=False,
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


def _attention(argv: list[str]) -> int:
    parser = Parser(
        "bench attention",
        "attention, forward and backward, on one device: documents, windows, sinks and latent heads, "
        "beside plain causal attention",
        needs_config=False,
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="default: all but tiny")
    parser.add_argument("--json", metavar="OUT", help="also write the results to a file")
    options = parser.parse_args(argv)
    from moe_dtensor.bench.attention import DEFAULT, bench_attention

    try:
        results = bench_attention(options.shapes or DEFAULT, options.json)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    # What is there for comparison may fail.
    return 1 if any(result.failure for result in results if result.way.startswith("attend")) else 0


def _train(argv: list[str]) -> int:
    parser = Parser("bench train", "time whole training steps of a config (under torchrun for several ranks)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts (default: 5)")
    parser.add_argument("--measure", type=int, default=10, help="steps that are timed (default: 10)")
    parser.add_argument("--variants", type=Path, metavar="F", help="a TOML: a table of changed keys for each variant")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=("torchtitan", "torchtitan_amp"),
        help="then train torchtitan's Qwen3-MoE of the same sizes on the same batches (default: torchtitan)",
    )
    parser.add_argument(
        "--peer-microbatch", type=int, default=0, metavar="N", help="its sequences in a forward; 0: what fits"
    )
    parser.add_argument("--breakdown", action="store_true", help="also record where the GPUs' time goes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to a file")
    options, config = parser.load(argv)
    if min(options.warmup, options.measure) < 1:
        raise ConfigError(f"--warmup {options.warmup} and --measure {options.measure} must be at least 1.")
    peers = () if options.peers is None else tuple(options.peers) or ("torchtitan",)
    if peers and importlib.util.find_spec("torchtitan") is None:
        raise ConfigError("--peers needs the package torchtitan.", 'Run pip install -e ".[torchtitan]".')
    world_size = read_world_size(1)
    variants = load_variants(options.variants, config) if options.variants else {"": config}
    for variant in variants.values():
        check(variant, world_size)
    from moe_dtensor.bench.train import Options, bench_train

    resolved = {name: resolve(variant, world_size) for name, variant in variants.items()}
    measured = (options.warmup, options.measure, options.breakdown, options.json)
    return bench_train(resolved, Options(*measured, peers, options.peer_microbatch))


def _transformers(argv: list[str]) -> int:
    parser = Parser(
        "bench transformers",
        "a Qwen3-MoE of transformers with these experts and with its own, forward and backward, one device",
        needs_config=False,
    )
    known = ("moe_dtensor", "grouped_mm", "batched_mm", "eager")
    parser.add_argument("--widths", choices=("qwen3_30b", "tiny"), help="default: qwen3_30b on a GPU, tiny without")
    parser.add_argument("--layers", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--sequences", type=int, default=2, help="of a batch (default: 2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    parser.add_argument("--implementations", nargs="+", choices=known, help="default: moe_dtensor grouped_mm eager")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to a file")
    options = parser.parse_args(argv)
    if min(options.layers, options.sequences, options.length) < 1:
        raise ConfigError("--layers, --sequences and --length must be at least 1.")
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("bench transformers needs the package transformers.", "Run pip install 'transformers>=5'.")
    import torch

    from moe_dtensor.bench.transformers import IMPLEMENTATIONS, Options, bench_transformers

    widths = options.widths or ("qwen3_30b" if torch.cuda.is_available() else "tiny")
    chosen = tuple(options.implementations or IMPLEMENTATIONS)
    sizes = (options.layers, options.sequences, options.length)
    results = bench_transformers(Options(widths, *sizes, chosen, options.json))
    return 1 if any(result.failure for result in results) else 0


def _generate(argv: list[str]) -> int:
    parser = Parser(
        "bench generate",
        "new tokens a second of a Hugging Face folder, here and by transformers' generate, on one device",
        needs_config=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="HF_DIR", help="the model")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 32], metavar="N", help="prompts at once (default: 1 32)"
    )
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens of each (default: 128)")
    parser.add_argument(
        "--peers", nargs="*", choices=("grouped_mm", "eager"), default=["grouped_mm"], help="experts of transformers"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to a file")
    options = parser.parse_args(argv)
    if min(*options.batches, options.prompt, options.tokens) < 1:
        raise ConfigError("--batches, --prompt and --tokens must be at least 1.")
    if not (options.checkpoint / "config.json").is_file():
        raise ConfigError(f"{str(options.checkpoint)!r} is no Hugging Face folder.", "convert --to hf writes one.")
    if options.peers and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "--peers needs the package transformers.", "Run pip install 'transformers>=5', or give no peers."
        )
    from moe_dtensor.bench.generate import Options, bench_generate

    sizes = (tuple(options.batches), options.prompt, options.tokens)
    bench_generate(Options(options.checkpoint, *sizes, tuple(options.peers), options.json))
    return 0
