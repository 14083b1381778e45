"""``train``: what torchrun starts on every rank."""

from __future__ import annotations

import os

from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.resolve import resolve

HELP = "train a model (under torchrun for several ranks)"


def main(argv: list[str]) -> int:
    """Load and check the config, then train; 0 when the run has finished."""
    _, config = Parser("train", HELP).load(argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check(config, world_size)

    # Only now: a wrong config is told without waiting for torch.
    from moe_dtensor.train.loop import train

    return train(resolve(config, world_size)) or 0
