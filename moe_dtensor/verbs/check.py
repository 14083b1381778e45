"""``check``: may config and data run on so many ranks? Loads no torch. And: does a checkpoint's proof still hold?"""

from __future__ import annotations

import contextlib
from pathlib import Path

from moe_dtensor.config.check import check
from moe_dtensor.config.check_files import check_files, size_of_files
from moe_dtensor.config.command_line import Parser, read_world_size, split_overrides
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import microbatches, resolve
from moe_dtensor.config.schema import Config

HELP = "check a config without starting anything (no torch, a second or two)"

SMALL = 2 * 2**20
"""Bytes of data that are read here; a rank reads more."""


def main(argv: list[str]) -> int:
    """Print one line on what would run and return 0, or raise ConfigError."""
    if any(word.partition("=")[0] == "--checkpoint" for word in argv):
        return _check_checkpoint(argv)
    parser = Parser("check", HELP)
    parser.add_argument("--checkpoint", metavar="DIR", help="instead: what a checkpoint's proof still holds for")
    parser.add_argument("--world", type=int, metavar="N", help="ranks (default: WORLD_SIZE, else what [mesh] asks for)")
    options, config = parser.load(argv)
    world_size = options.world if options.world is not None else read_world_size(_own_size(config))
    check(config, world_size)
    check_files(config)
    read_small_data(resolve(config, world_size))
    line = f"{options.config}: {describe(resolve(config, world_size), world_size)}"
    with contextlib.suppress(OSError):  # a full output says nothing of the config
        print(line, flush=True)
    return 0


def read_small_data(config: Config) -> None:
    """Read data that takes a moment as each rank will: what is wrong with it is told before torch is loaded.

    Raises:
        ConfigError: a file, a record, an id or the tokenizer is not what it must be.
    """
    size = size_of_files(config)
    if size is None or size > SMALL:
        return
    from moe_dtensor.data.corpus import build_corpus, set_vocabulary

    corpus = build_corpus(config)
    set_vocabulary(config, corpus)
    corpus.fingerprint()
    if config.data.corpus == "datasets" and not config.data.sources:
        for _ in corpus.documents("train"):
            pass


def _check_checkpoint(argv: list[str]) -> int:
    """Say what of a checkpoint's proof no longer matches; 1 if anything, or if there is none."""
    parser = Parser("check", HELP, needs_config=False)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, checkpoint or HF folder")
    parser.add_argument("--config", metavar="F", help="what to compare with; default: the run's own config.toml")
    own, overrides = split_overrides(argv)
    options = parser.parse_args(own)
    if overrides and not options.config:
        raise ConfigError(f"--{next(iter(overrides))} changes no config: none is given.", "Name it with --config F.")
    from moe_dtensor.verify.stamp import find_carrier, findings

    carrier = find_carrier(options.checkpoint, load(options.config, overrides) if options.config else None)
    print(carrier.path)
    found = list(findings(carrier))
    for finding in found:
        print(f"  {finding.what}: {finding.text}")
    wrong = [finding.what for finding in found if finding.ok is False]
    print(f"does not hold any more: {', '.join(wrong)}" if wrong else "the proof holds")
    return 1 if wrong else 0


def describe(config: Config, world_size: int) -> str:
    """Mesh and batch of a resolved config, in a line."""
    mesh, training = config.mesh, config.training
    return (
        f"dp={mesh.dp} x pp={mesh.pp} x tp={mesh.tp} = {world_size} ranks; "
        f"a step is {training.global_batch_size} sequences of {training.seq_len} tokens, "
        f"{microbatches(config)} microbatches of {training.microbatch_size} on each dp rank"
    )


def _own_size(config: Config) -> int:
    mesh = config.mesh
    return max(1, mesh.dp) * mesh.pp * mesh.tp
