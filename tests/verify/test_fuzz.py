"""What is drawn is legal and repeats; a failure is shrunk to what makes it, and its command judges it again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.load import load, override
from moe_dtensor.config.schema import Config
from moe_dtensor.verify import run
from moe_dtensor.verify.fuzz import MESHES, TOGETHER, Drawn, command, drawn_keys, draws, shrink_failure, smallest
from moe_dtensor.verify.inputs import global_batch
from moe_dtensor.verify.miniature import Case, Layout, legal, whole_case
from moe_dtensor.verify.run import prove

DEBUG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")

REACHED: dict[str, Callable[[Config], bool]] = {
    "latent attention": lambda c: c.model.kv_rank > 0,
    "queries of a latent": lambda c: c.model.q_rank > 0,
    "windows with a base of their own": lambda c: c.model.window_theta > 0,
    "sinks": lambda c: c.model.sinks,
    "a gate on what experts read": lambda c: c.moe.gate_on == "input",
    "a gated shared expert": lambda c: c.moe.shared_gate,
    "expert biases": lambda c: c.moe.expert_bias,
    "groups of experts": lambda c: c.moe.expert_groups > 0,
    "experts that choose": lambda c: c.moe.router == "expert_choice",
    "documents": lambda c: c.data.document_mask,
    "later tokens": lambda c: c.model.mtp_depth > 0,
    "norms at the end": lambda c: c.model.norm_at == "post",
    "scales": lambda c: c.model.residual_scale != 1,
    **{f"scaling {kind}": lambda c, kind=kind: c.rope.scaling == kind for kind in ("llama3", "yarn", "longrope")},
}
"""What one key alone does not switch on, or seldom."""


def test_draws_are_legal_repeat_and_reach_most_of_the_schema() -> None:
    first = list(itertools.islice(draws(3), 96))
    assert list(itertools.islice(draws(3), 16)) == first[:16]
    assert all(legal(drawn.case.config, [drawn.case.layout]) for drawn in first)
    assert len({repr(drawn.case) for drawn in first}) == len(first)
    assert len({key for drawn in first for key in drawn.changes}) > 0.8 * len(drawn_keys())
    assert [what for what, is_in in REACHED.items() if not any(is_in(drawn.case.config) for drawn in first)] == []


@pytest.mark.parametrize("values", TOGETHER, ids=lambda values: next(iter(values)))
def test_keys_that_are_drawn_together_can_stand_together(values: dict[str, tuple[Any, ...]]) -> None:
    """A group that is never legal is never drawn: so experts that choose had been left out."""
    order = random.Random(0)
    layouts = [Layout(dp, pp, tp, "1F1B" if pp > 1 else "none") for dp, pp, tp in MESHES for _ in range(10)]
    drawn = [({key: order.choice(choices) for key, choices in values.items()}, layout) for layout in layouts]
    assert any(legal(override(smallest(layout), keys), [layout]) for keys, layout in drawn)


def test_meshes_and_schedules_are_drawn_from_what_is_given() -> None:
    drawn = itertools.islice(draws(3, 2, [(1, 2, 1), (2, 1, 1)], ["GPipe", "1F1B"]), 40)
    layouts = {(d.case.layout.mesh, d.case.layout.schedule) for d in drawn}
    assert layouts == {("1x2x1", "GPipe"), ("1x2x1", "1F1B"), ("2x1x1", "none")}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--schedules", "2F2B"], "no such schedule"),
        (["--meshes", "2x2"], "not a mesh"),
        (["--dtype", "float32", "--compiled"], "--fuzz with --dtype, --compiled"),
    ],
)
def test_options_of_the_fuzz_that_mean_nothing_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--config", DEBUG, "--fuzz", "2", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_failure_is_shrunk_to_the_key_that_makes_it() -> None:
    layout = Layout(2, 1, 2)
    changes = {"moe.top_k": 2, "model.activation": "gelu", "moe.gate_scale": 2.5, "training.seed": 3}
    drawn = Drawn(whole_case(layout, override(smallest(layout), changes)), changes)

    def fails(case: Case) -> bool:
        return case.config.moe.gate_scale == 2.5 and case.layout.tp == 2

    shrunk = shrink_failure(drawn, fails)
    assert shrunk.changes == {"moe.gate_scale": 2.5}
    assert shrunk.case.layout == Layout(1, 1, 2)


def test_a_failure_is_shrunk_by_halves() -> None:
    layout = Layout(1, 1, 1)
    kept = {"moe.top_k": 3, "optimizer.beta1": 0.5}
    many = {
        "training.seed": 3,
        "model.norm_eps": 1e-3,
        "optimizer.beta2": 0.5,
        "optimizer.eps": 1e-4,
        "moe.z_loss": 0.1,
    }
    many |= {"model.rope_theta": 100.0, "moe.gate_scale": 2.5, "model.sinks": True, "optimizer.weight_decay": 4.0}
    changes = {**dict(list(many.items())[:5]), **kept, **dict(list(many.items())[5:])}
    tried: list[Case] = []

    def fails(case: Case) -> bool:
        tried.append(case)
        return case.config.moe.top_k == 3 and case.config.optimizer.beta1 == 0.5

    drawn = Drawn(whole_case(layout, override(smallest(layout), changes)), changes)
    assert shrink_failure(drawn, fails).changes == kept
    assert len(tried) < 2 * len(changes)
    assert shrink_failure(drawn, fails, most=0).changes == changes


def test_the_command_makes_the_same_case(capsys: object) -> None:
    drawn = next(draws(5))
    words = command(drawn.case, DEBUG, load(DEBUG)).split()[3:]
    assert main([word.strip("'") for word in words]) == 0


@pytest.mark.full
def test_some_cases_pass() -> None:
    assert main(["verify", "--config", DEBUG, "--fuzz", "4", "--seed", "11"]) == 0


def test_no_sequence_is_one_token_over_and_over() -> None:
    config = override(smallest(Layout(1, 1, 1)), {"training.seq_len": 2, "model.vocab_size": 5})
    batches = [batch for step in range(1, 9) for batch in global_batch(config, step)]
    assert len(batches) == 32
    assert all(len(set(row)) > 1 for batch in batches for row in batch.tokens.tolist())


def test_an_oracle_that_raises_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case whose scaling divides by zero had ended a fuzz of two thousand."""
    layout = Layout(1, 1, 1)
    good, bad = (whole_case(layout, override(smallest(layout), {"training.seed": seed})) for seed in (1, 2))
    right = run.steps

    def steps(config: Config, *inputs: Any) -> Any:
        if config.training.seed == 2:
            raise ZeroDivisionError("float division by zero")
        return right(config, *inputs)

    monkeypatch.setattr(run, "steps", steps)
    first, second, third = prove([good, bad, good])
    assert first.ok
    assert third.ok
    assert not second.ok
    assert second.failure == "the oracle: ZeroDivisionError: float division by zero"
