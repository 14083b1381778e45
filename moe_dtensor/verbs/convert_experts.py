"""The part of ``convert`` that changes experts: upcycling, pruning, merging, adding."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_dtensor.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_dtensor.checkpoint.surgery import Cut

CHANGES = ("upcycle", "prune_experts", "merge_experts", "add_experts")


def add_options(parser: argparse.ArgumentParser) -> None:
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


def asked(options: argparse.Namespace) -> list[str]:
    """The changes of experts that the command line names."""
    return [f"--{name.replace('_', '-')}" for name in CHANGES if getattr(options, name) is not None]


def changes(options: argparse.Namespace) -> bool:
    """Whether the command line asks for other experts.

    Raises:
        ConfigError: for several changes at once, or of the wrong kind of folder.
    """
    named = asked(options)
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


def run(options: argparse.Namespace) -> str:
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
