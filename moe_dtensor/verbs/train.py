"""``train``: what a launcher starts on every rank."""

from __future__ import annotations

import os

from moe_dtensor.config.check import check
from moe_dtensor.config.check_files import check_files
from moe_dtensor.config.command_line import Parser, check_meeting, read_world_size
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.orphans import end_when_asked

HELP = "train a model (./run_train.sh starts it on several ranks)"


def main(argv: list[str]) -> int:
    """Load and check the config, then train; 0 when the run has finished."""
    if any(word in argv for word in ("-h", "--help")):
        Parser("train", HELP).parse_args(["--help"])
    end_when_asked()
    world_size = read_world_size(1)
    try:
        config: Config | ConfigError = read_config(argv, world_size)
    except ConfigError as error:
        # Only now: a wrong config is told without waiting for torch, but where there are several ranks they have to
        # find out together whose it is.
        if world_size == 1 or "MASTER_ADDR" not in os.environ:
            raise
        config = error
    check_meeting(world_size)

    from moe_dtensor.train.rank import run_rank

    return run_rank(config)


def read_config(argv: list[str], world_size: int) -> Config:
    """The config of the command line, checked; not resolved."""
    _, config = Parser("train", HELP).load(argv)
    check(config, world_size)
    check_files(config)
    return config
