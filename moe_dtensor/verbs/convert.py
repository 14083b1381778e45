"""``convert``: weights from and to Hugging Face folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.verbs import convert_experts

HELP = "convert weights from or to a Hugging Face folder"
DTYPES = ("bfloat16", "float32", "float64")


def main(argv: list[str]) -> int:
    """Convert, print a line on what was written, and return 0; or raise ConfigError and leave nothing behind."""
    options = _parse(argv)
    if convert_experts.changes(options):
        print(convert_experts.run(options))
        return 0
    if options.source == options.to:
        raise ConfigError(
            f"--from {options.source} --to {options.to} changes nothing.",
            "Name hf and native, or a change of experts such as --upcycle.",
        )
    # Only now: a wrong command line is told without waiting for torch.
    from moe_dtensor.checkpoint.hugging_face import convert

    if options.to == "hf":
        print(convert.to_hugging_face(options.input, options.output, options.dtype, options.architecture))
    elif options.config_only:
        print(convert.config_only(options.input, options.output))
    else:
        print(convert.to_native(options.input, options.output, options.dtype))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("convert", HELP, needs_config=False)
    parser.add_argument("--from", dest="source", choices=("hf", "native"), help="kind of --input; default: what it is")
    parser.add_argument("--to", choices=("hf", "native"), help="kind of --output; default: native, from native hf")
    parser.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="hf: a model's folder; native: a run or a checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; default: to native as in the files, to hf what the run computed in",
    )
    parser.add_argument(
        "--architecture",
        default="auto",
        metavar="NAME",
        help="model_type to export as; default: auto, the first that fits",
    )
    parser.add_argument("--config-only", action="store_true", help="from hf: write the TOML alone (a file or a folder)")
    convert_experts.add_options(parser)
    options = parser.parse_args(argv)
    options.source = options.source or ("hf" if (options.input / "config.json").is_file() else "native")
    stays_native = options.source == "hf" or options.config_only or convert_experts.asked(options)
    options.to = options.to or ("native" if stays_native else "hf")
    if options.to == "native" and options.architecture != "auto":
        raise ConfigError("--architecture is for --to hf: a folder's config.json names its own.", "Take it out.")
    if options.to == "hf" and options.config_only:
        raise ConfigError("--config-only is for --to native.", "Take it out.")
    return options
