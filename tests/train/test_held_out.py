"""Texts measured as training goes: the same on every mesh and schedule, and as the verb ``eval`` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build as build_config
from moe_dtensor.config.load import dump, load, override
from moe_dtensor.config.schema import Config, Eval, EvalSet
from moe_dtensor.data.loader import IGNORED
from moe_dtensor.evaluate.score import Request
from moe_dtensor.train.held_out import pack
from tests.train.starts import Start, tiny

TEXTS = {"short": ["one two three", "four", "a" * 9, "zwölf"], "long": ["the whole of a longer text " * 4, "and one"]}
MESHES = {
    "2x1x1": {"mesh.dp": "2"},
    "1x2x1": {"mesh.pp": "2", "model.num_layers": "2"},
    "1x1x2": {"mesh.tp": "2"},
    "2x1x2": {"mesh.dp": "2", "mesh.tp": "2", "mesh.experts": "dp"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    files = {name: folder / f"{name}.jsonl" for name in TEXTS}
    for name, file in files.items():
        file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[name]))
    return files


def run(folder: Path, texts: dict[str, Path], ranks: int = 1, **changes: str) -> list[dict[str, Any]]:
    """The records of four steps, evaluated after the second and the fourth."""
    sets = ", ".join(f'{{name = "{name}", path = "{file}", text_key = "body"}}' for name, file in texts.items())
    own = {"eval.interval": "2", "eval.sets": f"[{sets}]", "training.steps": "4", "training.microbatch_size": "2"}
    wide = {f"training.{key}": "float64" for key in ("dtype", "param_dtype", "reduce_dtype")}
    values = {**own, **wide, "data.corpus": "stdlib", "model.init_std": "0.2", "optimizer.lr": "0.01", **changes}
    folder.parent.mkdir(exist_ok=True)
    argv = tiny(folder, **{key.replace(".", "__"): value for key, value in values.items()})
    ended = Start(folder.parent, argv, ranks).wait(300.0)
    assert ended.statuses == [0] * ranks, ended.text
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    more = {"training.sample_prompts": "import,def", "training.sample_tokens": "5", "metrics.tensorboard": "true"}
    return folder, run(folder, texts, **more)


def test_each_set_is_a_curve_and_the_verb_agrees(
    alone: tuple[Path, list[dict[str, Any]]], texts: dict[str, Path]
) -> None:
    folder, records = alone
    assert ["eval_loss" in record for record in records] == [False, True, False, True]
    assert set(records[3]["eval_loss"]) == set(TEXTS)
    assert records[3]["eval_loss"] != records[1]["eval_loss"]
    out = folder.parent / "out.json"
    argv = ["eval", "--checkpoint", str(folder), "--json", str(out), "--data.text_key", "body", "--data"]
    ended = Start(folder.parent, [*argv, *(f"{name}={file}" for name, file in texts.items())], 1).wait(300.0)
    assert ended.statuses == [0], ended.text
    for name, found in json.loads(out.read_text())["data"].items():
        assert found["loss"] == pytest.approx(records[3]["eval_loss"][name], rel=1e-12)
        assert found["bits_per_byte"] == pytest.approx(records[3]["eval_bits_per_byte"][name], rel=1e-12)
        assert found["bytes"] == sum(len(text.encode()) for text in TEXTS[name])
        assert found["documents"] == len(TEXTS[name])
    assert "bits per byte" in ended.text


def test_samples_are_what_generate_says(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = alone
    assert ["samples" in record for record in records] == [False, True, False, True]
    samples = records[3]["samples"]
    assert list(samples) == ["import", "def"]
    argv = ["generate", "--checkpoint", str(folder), "--max-tokens", "5", "--prompts", str(folder.parent / "p.jsonl")]
    (folder.parent / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in samples))
    ended = Start(folder.parent, argv, 1).wait(300.0)
    said = [json.loads(line)["completion"] for line in ended.text.splitlines() if line.startswith("{")]
    assert said == list(samples.values())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("eval_loss/short")] == [2, 4]
    assert "samples/1/text_summary" in events.Tags()["tensors"]
    assert [e.step for e in events.Scalars("eval_expert_load_max_over_mean/layer_1")] == [2, 4]


@pytest.mark.parametrize(
    "mesh", ["1x2x1", *(pytest.param(mesh, marks=pytest.mark.full) for mesh in ("2x1x2", "2x1x1", "1x1x2"))]
)
def test_every_mesh_measures_the_same(
    mesh: str, alone: tuple[Path, list[dict[str, Any]]], texts: dict[str, Path], tmp_path: Path
) -> None:
    ranks = int(np.prod([int(size) for size in mesh.split("x")]))
    more = {} if "mesh.pp" in MESHES[mesh] else {"training.sample_prompts": "import,def", "training.sample_tokens": "5"}
    records = run(tmp_path / "run", texts, ranks, **MESHES[mesh], **more)
    for found, expected in zip(records[1::2], alone[1][1::2], strict=True):
        for key in ("eval_loss", "eval_bits_per_byte", "eval_expert_load_cv"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9), key
        if more:
            assert found["samples"] == expected["samples"]


def test_windows_are_packed_apart() -> None:
    """Every target is in one row, with its own positions and document; what is left open is text without targets."""
    requests = [Request(tuple(range(10 * i, 10 * i + n)), n - 1) for i, n in enumerate((9, 4, 5, 3), 1)]
    tokens_RS, labels_RS, positions_RS, documents_RS = pack(requests, 8)
    assert tokens_RS.shape == (3, 8)
    assert sorted(labels_RS[labels_RS != IGNORED].tolist()) == sorted(t for r in requests for t in r.tokens[1:])
    for request in requests:
        row, start = np.argwhere(tokens_RS == request.tokens[0])[0]
        stop = start + len(request.tokens) - 1
        assert tokens_RS[row, start:stop].tolist() == list(request.tokens[:-1])
        assert positions_RS[row, start:stop].tolist() == list(range(stop - start))
        assert len(set(documents_RS[row, start:stop])) == 1
        assert (documents_RS[row] == documents_RS[row, start]).sum() == stop - start
    assert np.isin(tokens_RS, [t for r in requests for t in r.tokens]).all()


def test_sets_are_written_and_named_on_the_command_line(tmp_path: Path) -> None:
    config = build_config({"eval": {"interval": 5, "sets": [{"name": "wiki", "path": "a.txt"}]}})
    assert config.eval == Eval(5, (EvalSet("wiki", "a.txt"),))
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(tmp_path / "c.toml").eval == config.eval
    assert override(config, {"eval.sets.wiki.path": "b.txt"}).eval.sets[0].path == "b.txt"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval.interval": 3}, "no set to measure"),
        ({"eval.sets": "[{name = 'a', path = 'b'}]"}, "none is ever measured"),
        ({"eval.interval": 3, "eval.sets": "[{name = 'a.b', path = 'b'}]"}, "without a dot"),
        ({"eval.interval": 3, "eval.sets": "[{name = 'a'}]"}, "needs a path"),
        ({"eval.interval": 3, "eval.sets": "[{name = 'a', path = 'b'}, {name = 'a', path = 'c'}]"}, "'a' twice"),
        ({"training.sample_prompts": ("a",)}, "at each validation"),
        ({"training.sample_prompts": ("a",), "training.validation_interval": 5, "mesh.pp": 2}, "mesh.pp = 2"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    config = override(Config(), changes)
    with pytest.raises(ConfigError, match=told):
        check(config, 2)
