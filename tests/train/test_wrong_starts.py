"""A start that cannot succeed: one sentence, status 2, no trace, soon; whichever rank meets it."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import pytest

from moe_dtensor.__main__ import main

from ..config.test_scripts import run_train
from ..config.test_wrong_configs import WRONG
from .broken_data import BROKEN, Keys, files
from .starts import TINY, Start, tiny

SECONDS = 15.0
"""From the command to its end."""
QUICK = ("a broken line of JSON", "an id beyond the vocabulary", "a tokenizer without an end")
"""Kinds that only a rank can see, not `check`: tried by default."""
BY_DEFAULT = [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.full) for name in BROKEN]


def words_of(keys: Keys) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


def is_one_sentence(text: str, expected: str) -> str:
    """Empty, or what is wrong with what was printed."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if "Traceback" in text or len(errors) != 1:
        return f"a trace, or {len(errors)} errors"
    return "" if expected in errors[0] else f"not {expected!r}"


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_broken_data_of_one_rank_is_told_by_it(tmp_path: Path, name: str) -> None:
    """Errors of data were never printed where a rank other than 0 met them, and left torchrun's traces."""
    make, expected = BROKEN[name]
    (tmp_path / "broken").mkdir()
    (tmp_path / "good").mkdir()
    broken = make(tmp_path / "broken")
    good = {"data.corpus": "random"} if "data.path" not in broken else files(tmp_path / "good" / "a.txt", "text " * 900)
    argv = tiny(tmp_path / "run", **{key.replace(".", "__"): value for key, value in good.items()})
    ended = Start(tmp_path, argv, 4, more={3: words_of(broken)}).wait()
    assert ended.statuses == [2] * 4, ended.text
    assert not is_one_sentence(ended.text, expected), ended.text
    assert "rank 3 on " in ended.outputs[3]
    assert not (tmp_path / "run").exists()


def script(tmp_path: Path, words: list[str], ranks: int) -> tuple[int, str, float]:
    """Status, output and seconds of run_train.sh with the tiny config."""
    (tmp_path / "tiny.toml").write_text("")
    keys = words_of({**TINY, "run.folder": str(tmp_path / "run")})
    begin = time.monotonic()
    done = run_train(*keys, *words, CONFIG_FILE=str(tmp_path / "tiny.toml"), NGPU=str(ranks))
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.full
def test_broken_data_under_the_script(tmp_path: Path) -> None:
    """On four ranks, each kind; all are tried before the test judges."""
    wrong, slowest = {}, 0.0
    for name, (make, expected) in BROKEN.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        status, text, seconds = script(folder, words_of(make(folder)), 4)
        slowest = max(slowest, seconds)
        problem = is_one_sentence(text, expected)
        if status != 2 or problem or seconds > SECONDS or (folder / "run").exists():
            wrong[name] = f"status {status}, {seconds:.1f} s, {problem}: {text[-800:]}"
        shutil.rmtree(folder)
    print(f"{len(BROKEN)} kinds of broken data, the slowest {slowest:.1f} s")
    assert not wrong


@pytest.mark.parametrize("name", BROKEN)
def test_check_tells_broken_data(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the ranks did, once each had loaded torch: on a busy machine after minutes."""
    make, expected = BROKEN[name]
    keys = words_of(make(tmp_path))
    assert main(["check", *tiny(tmp_path / "run")[1:], "--world", "4", *keys]) == 2
    assert not is_one_sentence(capsys.readouterr().err, expected)


def ranks_for(words: list[str]) -> int:
    """Those of the mesh that the words name; 4 if they name none."""
    given = dict(zip(words[::2], words[1::2], strict=False))
    sizes = [given[key] for key in ("--mesh.dp", "--mesh.pp", "--mesh.tp") if key in given]
    return math.prod(max(1, int(size)) for size in sizes) if sizes else 4


@pytest.mark.full
def test_wrong_configs_under_the_script(tmp_path: Path) -> None:
    """More than fifty, each by run_train.sh."""
    wrong, slowest = {}, 0.0
    rows = [row for row in WRONG if "--world" not in row[0]]
    assert len(rows) >= 50
    for words, expected, _ in rows:
        begin = time.monotonic()
        done = run_train(*words.split(), CONFIG_FILE="tests/config/plain.toml", NGPU=str(ranks_for(words.split())))
        seconds = time.monotonic() - begin
        slowest = max(slowest, seconds)
        problem = is_one_sentence(done.stderr, expected)
        if done.returncode != 2 or problem or seconds > SECONDS or done.stdout:
            wrong[words] = f"status {done.returncode}, {seconds:.1f} s, {problem}: {done.stderr[-500:]}"
    print(f"{len(rows)} wrong configs, the slowest {slowest:.1f} s")
    assert not wrong
