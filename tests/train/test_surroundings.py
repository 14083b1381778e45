"""What is around a run and not in its config: outputs, the account, the launcher's variables."""

from __future__ import annotations

import getpass
import os
import pwd
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dtensor.__main__ import main

from .starts import Start, tiny
from .test_ends import losses


def close_outputs(rank: int) -> None:
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python sets them


def fill_outputs(rank: int) -> None:
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def leave_no_reader(rank: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)


@pytest.mark.parametrize("outputs", [close_outputs, fill_outputs, leave_no_reader])
def test_no_output_ends_a_run(tmp_path: Path, outputs: Callable[[int], None]) -> None:
    """A closed standard output was a traceback at the start, a full one at the first step."""
    ended = Start(tmp_path, tiny(tmp_path / "run"), 1, before=outputs).wait()
    assert ended.statuses == [0]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_user_without_account_and_home(tmp_path: Path) -> None:
    """It was a traceback, of this program or of a library that asks for the user's name."""

    def have_no_account(rank: int) -> None:
        def nobody(uid: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        pwd.getpwuid = nobody  # type: ignore[assignment]
        for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        tempfile.tempdir = str(tmp_path)
        if rank == 0:
            with pytest.raises(KeyError):
                getpass.getuser()

    (tmp_path / "text.txt").write_text("words of a text\n" * 200)
    argv = tiny(tmp_path / "run", data__corpus="files", data__path=str(tmp_path / "text.txt"))
    ended = Start(tmp_path, argv, 1, before=have_no_account).wait()
    assert ended.statuses == [0], ended.text
    (cache,) = tmp_path.glob("moe_dtensor-*")
    assert cache.stat().st_mode & 0o777 == 0o700


OPEN_TO_ALL = all(folder.stat().st_mode & 0o001 for folder in Path(os.__file__).resolve().parents)


@pytest.mark.skipif(os.getuid() != 0 or not OPEN_TO_ALL, reason="only root becomes a user, who needs Python's files")
def test_another_user(tmp_path: Path) -> None:
    """One that the system has no account for, with no home and no right to what root has."""

    def become(rank: int) -> None:
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        tempfile.tempdir = str(tmp_path / "open")
        with pytest.raises(KeyError):
            pwd.getpwuid(os.getuid())

    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "closed").mkdir()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "open" / "text.txt").write_text("words of a text\n" * 200)
    argv = tiny(tmp_path / "open" / "run", data__corpus="files", data__path=str(tmp_path / "open" / "text.txt"))
    ended = Start(tmp_path / "open", argv, 2, before=become).wait()
    assert ended.statuses == [0, 0], ended.text
    assert (tmp_path / "open" / "run" / "run.json").stat().st_uid == 12345
    argv = tiny(tmp_path / "open" / "closed" / "run")
    (tmp_path / "open" / "closed").chmod(0)
    ended = Start(tmp_path / "open", argv, 1, before=become).wait()
    assert (ended.statuses, len(ended.errors)) == ([2], 1), ended.text
    secret = tmp_path / "open" / "secret.txt"
    secret.write_text("words")
    secret.chmod(0)
    argv = tiny(tmp_path / "open" / "other", data__corpus="files", data__path=str(secret))
    ended = Start(tmp_path / "open", argv, 1, before=become).wait()
    assert ended.statuses == [2], ended.text
    assert len(ended.errors) == 1
    assert "Traceback" not in ended.text


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no number"),
        ({"WORLD_SIZE": "0"}, "RANK = None is none of WORLD_SIZE = 0 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2 is none of WORLD_SIZE = 2 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK = 'x' is no number"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "p"}, "MASTER_PORT = 'p' is no number"),
    ],
)
def test_the_launchers_variables(
    tmp_path: Path,
    variables: dict[str, str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """WORLD_SIZE by itself was 600 seconds of silence, others were tracebacks."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(tiny(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert problem in error
