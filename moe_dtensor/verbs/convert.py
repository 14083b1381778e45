"""``convert``: weights from and to Hugging Face folders; upcycling, pruning, merging and adding of experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.errors import ConfigError

HELP = "convert weights from or to a Hugging Face folder"
DTYPES = ("bfloat16", "float32", "float64")


def main(argv: list[str]) -> int:
    """Convert, print a line on what was written, and return 0; or raise ConfigError and leave nothing behind."""
    options = _parse(argv)
    if _changes_experts(options):
        print(_change_experts(options))
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
    _add_expert_options(parser)
    options = parser.parse_args(argv)
    options.source = options.source or ("hf" if (options.input / "config.json").is_file() else "native")
    stays_native = options.source == "hf" or options.config_only or _asked(options)
    options.to = options.to or ("native" if stays_native else "hf")
    if options.to == "native" and options.architecture != "auto":
        raise ConfigError("--architecture is for --to hf: a folder's config.json names its own.", "Take it out.")
    if options.to == "hf" and options.config_only:
        raise ConfigError("--config-only is for --to native.", "Take it out.")
    return options


if TYPE_CHECKING:
    from torch import Tensor

    from moe_dtensor.checkpoint.surgery import Cut

CHANGES = ("upcycle", "prune_experts", "merge_experts", "add_experts")


def _add_expert_options(parser: argparse.ArgumentParser) -> None:
    """Of a dense model, and of a mixture."""
    dense = parser.add_argument_group("upcycling: a dense model becomes a mixture of E experts (to native)")
    dense.add_argument("--upcycle", type=int, metavar="E", help="experts in a block")
    dense.add_argument("--upcycle-top-k", type=int, default=2, metavar="K", help="experts of a token; default: 2")
    dense.add_argument("--upcycle-split", type=int, default=1, metavar="M", help="parts of a feed-forward; default: 1")
    dense.add_argument("--upcycle-noise", type=float, default=0.0, metavar="S", help="over a weight's own spread")
    dense.add_argument("--upcycle-noise-share", type=float, default=1.0, metavar="S", help="share of noisy copies")
    dense.add_argument("--upcycle-reinit", type=float, default=0.0, metavar="S", help="share of units drawn anew")
    dense.add_argument("--upcycle-router-std", type=float, default=0.02, metavar="S", help="of the router's rows")
    dense.add_argument(
        "--upcycle-gates",
        choices=("normalized", "softmax"),
        default="normalized",
        help="normalized: they sum to 1, which keeps the function; softmax: over all experts",
    )
    dense.add_argument("--upcycle-layers", type=int, nargs="+", default=(), metavar="I", help="blocks; default: all")
    mixture = parser.add_argument_group("surgery: a run or checkpoint with other experts (from native to native)")
    mixture.add_argument("--prune-experts", metavar="FILE|N", help="without those, or without the N least loaded")
    mixture.add_argument(
        "--merge-experts", metavar="FILE|N", nargs="?", const="", help="groups, or down to N (default: half)"
    )
    mixture.add_argument("--add-experts", type=int, metavar="N", help="copies; a multiple of E: of each as many")
    mixture.add_argument("--add-noise", type=float, default=0.01, metavar="S", help="of copies; default: 0.01")
    parser.add_argument("--seed", type=int, default=0, help="of noise and of what is drawn")


def _asked(options: argparse.Namespace) -> list[str]:
    """The changes of experts that the command line names."""
    return [f"--{name.replace('_', '-')}" for name in CHANGES if getattr(options, name) is not None]


def _changes_experts(options: argparse.Namespace) -> bool:
    """Whether the command line asks for other experts.

    Raises:
        ConfigError: for several changes at once, or of the wrong kind of folder.
    """
    named = _asked(options)
    if not named:
        return False
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are two changes.", "Make one after the other.")
    if options.to != "native":
        raise ConfigError(f"{named[0]} writes a native folder.", "Write --to native; convert that to hf afterwards.")
    if named != ["--upcycle"] and options.source != "native":
        raise ConfigError(f"{named[0]} works on native folders.", "Convert with --from hf --to native first.")
    if options.dtype or options.config_only:
        raise ConfigError(f"{named[0]} keeps the dtype and writes weights.", "Take --dtype and --config-only out.")
    return True


def _change_experts(options: argparse.Namespace) -> str:
    """Make the change; a line on what was written."""
    from moe_dtensor.checkpoint import change
    from moe_dtensor.checkpoint.upcycle import Upcycling

    if options.upcycle is not None:
        how = Upcycling(
            num_experts=options.upcycle,
            top_k=options.upcycle_top_k,
            split=options.upcycle_split,
            noise=options.upcycle_noise,
            noise_share=options.upcycle_noise_share,
            reinit=options.upcycle_reinit,
            router_std=options.upcycle_router_std,
            normalize=options.upcycle_gates == "normalized",
            layers=tuple(options.upcycle_layers),
            seed=options.seed,
        )
        return change.upcycle_folder(options.source, options.input, options.output, how)
    noise = options.add_noise if options.add_experts is not None else 0.0
    return change.cut_folder(options.input, options.output, _maker(options), noise, options.seed)


def _maker(options: argparse.Namespace) -> Any:
    from moe_dtensor.checkpoint import surgery
    from moe_dtensor.checkpoint.change import read_groups

    if options.add_experts is not None:
        if options.add_experts < 1:
            raise ConfigError(f"--add-experts {options.add_experts} adds none.", "Give 1 or more.")
        return lambda _layer, _router, load_E: surgery.add(load_E, options.add_experts)
    pruning = options.prune_experts is not None
    text = options.prune_experts if pruning else options.merge_experts
    asked = read_groups(text) if text else None

    def make(layer: int, router_ED: Tensor, load_E: Tensor) -> Cut:
        experts = len(load_E)
        if asked is None or isinstance(asked, int):
            if not bool(load_E.any()):
                raise ConfigError(
                    "this checkpoint knows no load of its experts: no step of training is in it.",
                    "Name the experts in a FILE.",
                )
            count = experts // 2 if asked is None else asked
            if not 0 < count < experts:
                raise ConfigError(f"{count} of {experts} experts is no change.", f"Give 1 to {experts - 1}.")
            if pruning:
                return surgery.prune(experts, surgery.least_loaded(load_E, count))
            return surgery.merge(router_ED, load_E, count)
        named = _of_block(asked, layer)
        if not pruning:
            return surgery.merge_groups(load_E, _check_groups(named, experts, layer))
        _check_ids(named, experts, layer)
        return surgery.prune(experts, named)

    return make


def _of_block(asked: Mapping[int, list[Any]] | list[Any], layer: int) -> list[Any]:
    if isinstance(asked, list):
        return asked
    if layer not in asked:
        raise ConfigError(f"the file names no experts of block {layer}.", "Name some of each MoE block.")
    return asked[layer]


def _check_ids(named: list[Any], experts: int, layer: int) -> None:
    wrong = [e for e in named if not isinstance(e, int) or not 0 <= e < experts]
    if wrong:
        raise ConfigError(f"block {layer} has no expert {wrong[0]!r}.", f"There are experts 0 to {experts - 1}.")


def _check_groups(named: list[Any], experts: int, layer: int) -> list[list[int]]:
    """Every expert is in exactly one group."""
    groups = [list(group) if isinstance(group, list) else [group] for group in named]
    together = [e for group in groups for e in group]
    _check_ids(together, experts, layer)
    if sorted(together) != list(range(experts)) or not all(groups):
        raise ConfigError(
            f"block {layer}: the groups do not hold each of {experts} experts once.",
            "Put every expert into one group; a group of one stays as it is.",
        )
    return groups
