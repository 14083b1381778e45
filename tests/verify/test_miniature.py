"""A run's own config.toml, where all that follows from other keys is spelt out, has a miniature too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_dtensor.config.load import dump, load, override
from moe_dtensor.config.resolve import resolve, tp_axis
from moe_dtensor.config.schema import Checkpoint, Config, Data
from moe_dtensor.verify.miniature import Layout, legal, shrink

PRESETS = sorted(Path("train_configs").glob("*.toml"))
LAYOUTS = [Layout(1, 1, 1), Layout(2, 1, 2)]


def on_one_rank(config: Config) -> Config:
    config = replace(config, data=Data(corpus="random"), checkpoint=Checkpoint(), mesh=replace(config.mesh, dp=1))
    return override(config, {"mesh.pp": 1, "mesh.tp": 1, "model.vocab_size": config.model.vocab_size or 261})


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_of_a_resolved_config(preset: Path, tmp_path: Path) -> None:
    config = on_one_rank(load(preset))
    (tmp_path / "config.toml").write_text(dump(resolve(config, 1)))
    kept = on_one_rank(load(tmp_path / "config.toml"))
    small, own = shrink(kept, LAYOUTS), shrink(config, LAYOUTS)
    assert legal(small, LAYOUTS)
    assert (small.model.dim, small.model.head_dim, small.model.num_layers, small.moe.num_experts) == (
        own.model.dim,
        own.model.head_dim,
        own.model.num_layers,
        own.moe.num_experts,
    )


@pytest.mark.parametrize(("sequences", "kept"), [(3, {2: 1, 4: 1}), (2, {2: 0, 4: 1}), (16, {2: 0, 4: 0})])
def test_tp_splits_what_it_splits_of_the_config(sequences: int, kept: dict[int, int]) -> None:
    """Whole sequences (0) or positions (1)."""
    changes = {"training.microbatch_size": sequences, "training.global_batch_size": 2 * sequences}
    config, layouts = override(load(Path("train_configs/debug.toml")), changes), [Layout(1, 1, tp) for tp in (1, 2, 4)]
    small = shrink(config, layouts)
    assert small.training.microbatch_size <= 4
    for tp, axis in kept.items():
        assert tp_axis(Layout(1, 1, tp).place(small)) == tp_axis(Layout(1, 1, tp).place(config)) == axis
