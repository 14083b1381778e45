"""What a config names as a part of one's own is looked at before it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config
from moe_dtensor.data.corpus import build_own_corpus
from moe_dtensor.layers.assignment import build_assignment
from moe_dtensor.parallel.tensor import build_token_loss

MODULE = """
called = []

def anything(*words, **more):
    called.append(words)

def of_one(word):
    called.append(word)

class Thing:
    def __init__(self, *words):
        called.append(words)

number = 3
"""


def build_router(config: Config, name: str) -> Any:
    return build_assignment(replace(config, moe=replace(config.moe, router=name)), 0)


def build_loss(config: Config, name: str) -> Any:
    return build_token_loss(replace(config, training=replace(config.training, loss=name)), None)  # type: ignore[arg-type]


def build_corpus(config: Config, name: str) -> Any:
    return build_own_corpus(name, config)


@pytest.mark.parametrize(
    ("build", "name", "what"),
    [
        (build_router, "anything", "a class that derives from .*Assignment; it is a function"),
        (build_router, "Thing", "a class that derives from .*Assignment; it is the class Thing"),
        (build_router, "number", "it is a int"),
        (build_loss, "Thing", r"a function of \(logits, labels\); it is the class Thing"),
        (build_loss, "of_one", r"a function of \(logits, labels\); it is a function"),
        (build_loss, "number", "it is a int"),
        (build_corpus, "anything", r"a class with documents\(split\) and fingerprint\(\); it is a function"),
        (build_corpus, "Thing", "it is the class Thing"),
        (build_corpus, "called", "it is a list"),
    ],
)
def test_what_does_not_suit_is_not_called(
    build: Callable[[Config, str], Any], name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any attribute of any module was called with the config."""
    (tmp_path / "own_parts_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=what):
            build(Config(), f"own_parts_module:{name}")
        assert sys.modules["own_parts_module"].called == []
    finally:
        sys.modules.pop("own_parts_module", None)


@pytest.mark.parametrize("build", [build_router, build_loss, build_corpus])
def test_nothing_of_python_is_imported(build: Callable[[Config, str], Any]) -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(ConfigError, match="not a part of Python itself"):
        build(Config(), "antigravity:geohash")
    assert "antigravity" not in sys.modules
