"""The one exception a wrong config raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be run: the rule with its values, then the remedy on a line of its own."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)


class RankError(ConfigError):
    """A ConfigError that one rank alone met, in its own part of the data: that rank has to tell it."""
