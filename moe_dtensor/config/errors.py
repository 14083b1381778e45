"""What ends a command: a wrong config (status 2), or a run that fails by itself (status 1)."""

from __future__ import annotations

from collections.abc import Iterator

DONE = 0
FAILED = 1
WRONG = 2
"""The config or the data cannot be run; the same command fails again."""
AGAIN = 75
"""Asked to end, saved and ended: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
PEER_LOST = 76
"""Of a rank that ends because another one did; what a launcher makes of it is ``FAILED``."""


Broken = Iterator[tuple[str, str]]
"""(rule with its values, remedy) of each rule that a config breaks."""


class ConfigError(ValueError):
    """A config or data that cannot be run: the rule with its values, then the remedy on a line of its own.

    ``common``: every rank raises the same, so that it is told as nobody's.
    """

    def __init__(self, problem: str, remedy: str = "", common: bool = False) -> None:
        self.problem, self.remedy, self.common = problem, remedy, common
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)


class RunError(RuntimeError):
    """A run that cannot go on although config and data are right: what happened, then the remedy."""

    def __init__(self, problem: str, remedy: str = "", common: bool = False) -> None:
        self.problem, self.remedy, self.common = problem, remedy, common
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)


def words(problem: str, remedy: str = "", where: str = "") -> str:
    """An error as it is printed: ``error: [where] problem``, the remedy below."""
    text = f"{where}{problem}\n{remedy}" if remedy else f"{where}{problem}"
    return "error: " + text.rstrip("\n").replace("\n", "\n       ")
