"""TOML and overrides become the same typed Config, and back."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.command_line import Parser, split_overrides
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build, dump, load, override
from moe_dtensor.config.resolve import block_config, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import all_fields, markdown, tables

PRESETS = sorted(Path("train_configs").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_presets_are_right_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert config.run.folder == f"outputs/{path.stem}"
    world_size = config.mesh.pp * config.mesh.tp * 2
    check(config, world_size)
    resolved = resolve(config, world_size)
    check(resolved, world_size)
    assert resolve(resolved, world_size) == resolved
    written = tmp_path / "config.toml"
    written.write_text(dump(resolved), encoding="utf-8")
    assert load(written) == resolved


def test_all_presets_are_there() -> None:
    names = {path.stem for path in PRESETS}
    assert names >= {"debug", "neox_125m_dmoe", "olmoe_small", "olmoe_1b_7b", "mixtral_8x7b", "qwen3_30b_a3b"}


# (dp, pp, tp), schedule: every mesh that the documentation and the tests name.
MESHES = [
    *[(mesh, "1F1B") for mesh in ((1, 1, 1), (2, 2, 2), (1, 3, 8), (1, 2, 4), (4, 1, 2), (8, 1, 1), (2, 1, 1))],
    *[(mesh, "1F1B") for mesh in ((1, 1, 4), (1, 1, 8), (2, 1, 2), (1, 2, 2), (1, 3, 2), (4, 2, 1))],
    *[((1, pp, tp), "1F1B") for pp in (3, 2, 1) for tp in (1, 2, 4, 8)],
    *[
        (mesh, schedule)
        for mesh in ((2, 2, 2), (1, 3, 2), (1, 2, 4), (1, 3, 8))
        for schedule in ("GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    ],
]


@pytest.mark.parametrize(("mesh", "schedule"), MESHES)
def test_debug_is_legal_on_many_meshes(mesh: tuple[int, int, int], schedule: str) -> None:
    dp, pp, tp = mesh
    keys = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "pipeline.schedule": schedule}
    check(override(load("train_configs/debug.toml"), keys), dp * pp * tp)


def test_overrides_parse_by_type() -> None:
    words = ["--mesh.dp", "-1", "--moe.layers=[1, 3]", "--compile.enable", "True", "--optimizer.lr", "1", "--steps"]
    own, overrides = split_overrides([*words, "--data.path=a=b", "--training.norm_type", "inf", "--run.folder", "7"])
    assert own == ["--steps"]
    config = load("train_configs/debug.toml", overrides)
    assert config.mesh.dp == -1
    assert config.moe.layers == (1, 3)
    assert config.compile.enable is True
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert config.data.path == "a=b"
    assert config.training.norm_type == float("inf")
    assert config.run.folder == "7"


@pytest.mark.parametrize("text", ["1,3", "[1,3]", "(1, 3)", " 1 , 3 ", "1,3,"])
def test_lists_on_the_command_line(text: str) -> None:
    assert override(Config(), {"moe.layers": text}).moe.layers == (1, 3)


def test_empty_list_on_the_command_line() -> None:
    assert override(Config(), {"moe.layers": "[]"}).moe.layers == ()


def test_the_last_override_counts() -> None:
    assert split_overrides(["--model.dim", "1", "--model.dim=2"])[1] == {"model.dim": "2"}


def test_a_verb_adds_its_own_options() -> None:
    parser = Parser("verify", "compare meshes")
    parser.add_argument("--meshes", nargs="*")
    words = ["--config", "train_configs/debug.toml", "--meshes", "1x1x4", "2x2x2", "--model.dim", "64"]
    options, config = parser.load(words)
    assert options.meshes == ["1x1x4", "2x2x2"]
    assert config.model.dim == 64


def test_dump_escapes_strings(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    strange = 'a "b" \\ c\nd\té €'
    config = build({"run": {"folder": "f"}, "data": {"path": strange}, "training": {"norm_type": float("inf")}})
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_every_field_is_explained_and_in_the_reference() -> None:
    assert all(field.help.endswith(".") for field in all_fields().values())
    assert all(table.help for table in tables().values())
    committed = Path("docs/config.md").read_text(encoding="utf-8")
    assert committed == markdown(), "run: python -m moe_dtensor.config.tables > docs/config.md"


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        Parser("train", "train").load(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{key} " in text for key in all_fields())


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3  # type: ignore[misc]


def test_a_list_for_top_k_or_router_is_that_of_the_blocks() -> None:
    config = build({"moe": {"top_k": [1, 3], "router": ["topk", "sinkhorn", "hash"]}})
    resolved = resolve(config, 1)
    found = [(block.top_k, block.router) for i in range(6) for block in [block_config(resolved, i).moe]]
    assert found == [(1, "topk"), (3, "sinkhorn"), (1, "hash"), (3, "topk"), (1, "sinkhorn"), (3, "hash")]
    assert override(Config(), {"moe.top_k": "1,3", "moe.router": "topk, sinkhorn, hash"}) == config
    assert build(tomllib.loads(dump(config))) == config
    assert override(config, {"moe.top_k": 2, "moe.router": "topk"}).moe == build({"moe": {"router": "topk"}}).moe


@pytest.mark.parametrize("key", ["moe.router", "data.corpus", "training.loss"])
@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "shutil:rmtree", "builtins:eval"])
def test_a_part_of_python_is_no_part_of_ones_own(key: str, name: str) -> None:
    """A TOML could have any attribute of any module called."""
    config = load("tests/config/plain.toml", {key: name})
    with pytest.raises(ConfigError, match=f'{key} = "{name}" names a part of Python itself'):
        check(config, 1)
