"""``check``: is this config fit to run on so many ranks? Loads no torch."""

from __future__ import annotations

from moe_dtensor.config.check import check
from moe_dtensor.config.check_files import check_files
from moe_dtensor.config.command_line import Parser, read_world_size
from moe_dtensor.config.resolve import microbatches, resolve
from moe_dtensor.config.schema import Config

HELP = "check a config without starting anything (no torch, under a second)"


def main(argv: list[str]) -> int:
    """Print one line on what would run and return 0, or raise ConfigError."""
    parser = Parser("check", HELP)
    parser.add_argument("--world", type=int, metavar="N", help="ranks (default: WORLD_SIZE, else what [mesh] asks for)")
    options, config = parser.load(argv)
    world_size = options.world if options.world is not None else read_world_size(_own_size(config))
    check(config, world_size)
    check_files(config)
    print(f"{options.config}: {describe(resolve(config, world_size), world_size)}")
    return 0


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
