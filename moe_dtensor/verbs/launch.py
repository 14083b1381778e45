"""``launch``: torchrun's own agent with this program's words and exit statuses."""

from __future__ import annotations

from moe_dtensor.orphans import end_when_asked

HELP = "start this machine's ranks as torchrun does; ends with their status: launch [torchrun options] train --config F"


def main(argv: list[str]) -> int:
    """Start the ranks and wait for them: 0 done, 1 failed, 2 wrong config or data, 75 saved and ended when asked to."""
    end_when_asked()

    from moe_dtensor.train.agent import launch

    return launch(argv)
