"""What is drawn is legal and repeats; a failure is shrunk to what makes it, and its command judges it again."""

from __future__ import annotations

import itertools
from pathlib import Path

from moe_dtensor.__main__ import main
from moe_dtensor.config.build import override
from moe_dtensor.config.load import load
from moe_dtensor.verify.cases import Case, whole_case
from moe_dtensor.verify.fuzz import Drawn, command, drawn_keys, draws, shrink_failure, smallest
from moe_dtensor.verify.miniature import Layout, legal

DEBUG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")


def test_draws_are_legal_repeat_and_reach_most_of_the_schema() -> None:
    first, again = (list(itertools.islice(draws(3), 48)) for _ in range(2))
    assert first == again
    assert all(legal(drawn.case.config, [drawn.case.layout]) for drawn in first)
    assert len({repr(drawn.case) for drawn in first}) == len(first)
    assert len({key for drawn in first for key in drawn.changes}) > 0.8 * len(drawn_keys())


def test_a_failure_is_shrunk_to_the_key_that_makes_it() -> None:
    layout = Layout(2, 1, 2)
    changes = {"moe.top_k": 2, "model.activation": "gelu", "moe.gate_scale": 2.5, "training.seed": 3}
    drawn = Drawn(whole_case(layout, override(smallest(layout), changes)), changes)

    def fails(case: Case) -> bool:
        return case.config.moe.gate_scale == 2.5 and case.layout.tp == 2

    shrunk = shrink_failure(drawn, fails)
    assert shrunk.changes == {"moe.gate_scale": 2.5}
    assert shrunk.case.layout == Layout(1, 1, 2)


def test_the_command_makes_the_same_case(capsys: object) -> None:
    drawn = next(draws(5))
    words = command(drawn.case, DEBUG, load(DEBUG)).split()[3:]
    assert main([word.strip("'") for word in words]) == 0


def test_some_cases_pass() -> None:
    assert main(["verify", "--config", DEBUG, "--fuzz", "4", "--seed", "11"]) == 0
