"""What a run's folder keeps leads to the same places and the same data, from everywhere and later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import load
from moe_dtensor.config.schema import Checkpoint, Config, Data, Run, Source
from moe_dtensor.data.hub import DatasetsCorpus, pin_revisions, reads_hub
from moe_dtensor.data.tokenizer import build_tokenizer
from moe_dtensor.train.kept_config import absolute
from moe_dtensor.train.run_folder import kept_revisions

from .test_run_folder import begun, opened


def test_places_lead_there_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sources, and of a folder with a split, the relative path was kept: elsewhere it led nowhere."""
    for name in ("texts", "others", "weights"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    data = Data(sources=(Source(name="a", path="texts", weight=1), Source(name="b", path="others/*.txt", weight=1)))
    config = Config(run=Run(folder="run"), data=data, checkpoint=Checkpoint(initial="weights"))
    begun(config)
    monkeypatch.chdir("/")
    kept = load(tmp_path / "run" / "config.toml")
    assert [source.path for source in kept.data.sources] == [f"{tmp_path}/texts", f"{tmp_path}/others/*.txt"]
    assert kept.checkpoint.initial == f"{tmp_path}/weights"
    assert kept.run.folder == f"{tmp_path}/run"
    assert opened(kept).state == "unfinished"
    monkeypatch.chdir(tmp_path)
    assert opened(config).state == "unfinished"
    assert absolute("texts@validation") == f"{tmp_path}/texts@validation"
    assert absolute("org/name@train") == "org/name@train"
    assert absolute("bytes") == "bytes"


class Hub:
    """Answers for the hub: one dataset, whose newest commit moves."""

    newest = "a1"

    def dataset_info(self, name: str, revision: str | None) -> Any:
        if name != "org/name":
            raise OSError(f"404: {name}")
        return SimpleNamespace(sha={None: Hub.newest, "main": Hub.newest, "v1": "c3"}.get(revision, revision))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "newest", "a1")
    return Hub


def fingerprint(config: Config) -> str:
    return DatasetsCorpus(config, build_tokenizer("bytes")).fingerprint()


def begin(config: Config) -> Config:
    pinned = pin_revisions(config, kept_revisions(config))
    begun(pinned, fingerprint(pinned))
    return pinned


def test_a_run_reads_the_commit_it_began_with(tmp_path: Path, hub: type[Hub]) -> None:
    """A name on the hub had no revision: a resumed run read whatever lay there by then."""
    config = Config(run=Run(folder=str(tmp_path / "run")), data=Data(corpus="datasets", path="org/name"))
    assert reads_hub(config)
    assert begin(config).data.revision == "a1"
    hub.newest = "b2"
    assert begin(config).data.revision == "a1"
    assert load(tmp_path / "run" / "config.toml").data.revision == "a1"
    at = replace(config, data=replace(config.data, revision="main"))
    with pytest.raises(ConfigError, match=r"data.revision = 'a1' there, 'b2' here"):
        begin(at)
    fresh = replace(config, run=replace(config.run, fresh=True))
    assert begin(fresh).data.revision == "b2"


def test_an_older_run_goes_on_without_one(tmp_path: Path, hub: type[Hub]) -> None:
    config = Config(run=Run(folder=str(tmp_path / "run")), data=Data(corpus="datasets", path="org/name"))
    begun(config, fingerprint(config))
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace('revision = ""\n', ""))
    assert begin(config).data.revision == ""


def test_sources_and_names_that_are_not_there(tmp_path: Path, hub: type[Hub]) -> None:
    sources = (
        Source(name="a", corpus="datasets", path="org/name:en@train", weight=1, revision="v1"),
        Source(name="b", corpus="datasets", path=str(tmp_path), weight=1),
    )
    config = Config(run=Run(folder=str(tmp_path / "run")), data=Data(sources=sources))
    assert [source.revision for source in pin_revisions(config, None).data.sources] == ["c3", ""]
    other = replace(config, data=Data(corpus="datasets", path="org/other"))
    with pytest.raises(ConfigError, match=r"data.path = 'org/other' must be a dataset on the hub; OSError: 404"):
        pin_revisions(other, None)


def test_the_commit_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda **options: asked.append(options) or iter(()))
    data = Data(corpus="datasets", path="org/name", revision="a1", validation_path="org/name@test")
    corpus = DatasetsCorpus(Config(data=data), build_tokenizer("bytes"))
    corpus.documents("train")
    corpus.documents("validation")
    assert [(o["path"], o["split"], o["revision"]) for o in asked] == [
        ("org/name", "train", "a1"),
        ("org/name", "test", "a1"),
    ]


def test_a_revision_of_what_has_none() -> None:
    config = load("tests/config/plain.toml", {"data.revision": "a1"})
    with pytest.raises(ConfigError, match=r'data.revision = "a1" is for a name on the hub'):
        check(config, 1)
