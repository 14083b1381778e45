"""What this program writes where others may write, too: nothing of theirs is taken, nothing of theirs is harmed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.files import make_private
from moe_dtensor.data.host import HostChunks
from moe_dtensor.data.pack import cache_folder, locked


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache falls back to."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"moe_dtensor-{os.getuid()}"


def test_the_cache_in_the_temporary_folder_is_this_users_alone(shared: Path) -> None:
    assert cache_folder() == shared
    assert shared.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == shared


@pytest.mark.parametrize("how", ["link", "open", "another user's", "file"])
def test_a_folder_that_another_may_have_made_is_not_taken(
    shared: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken as found: whoever made it first could give all others their tokens."""
    match how:
        case "link":
            (tmp_path / "theirs").mkdir(mode=0o700)
            shared.symlink_to(tmp_path / "theirs")
        case "open":
            shared.mkdir()
            shared.chmod(0o777)
        case "another user's":
            shared.mkdir(mode=0o700)
            uid = os.getuid()
            shared.rename(shared.with_name(f"moe_dtensor-{uid + 1}"))
            monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        case "file":
            shared.touch()
    wanted = r"none can be used: '/dev/null/cache/moe_dtensor'.*; '.*/moe_dtensor-\d"
    with pytest.raises(ConfigError, match=wanted) as error:
        cache_folder()
    assert "Set XDG_CACHE_HOME" in error.value.remedy


def test_a_lock_empties_nothing_and_follows_no_link(tmp_path: Path) -> None:
    """A lock that was a link emptied what it led to."""
    victim = tmp_path / "notes.txt"
    victim.write_text("mine")
    (tmp_path / "a.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"), locked(tmp_path / "a.lock"):
        pass
    assert victim.read_text() == "mine"
    with locked(victim):
        pass
    assert victim.read_text() == "mine"


def test_chunks_are_not_shared_through_a_folder_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = HostChunks(0, 2, f"{os.getpid()}-test-private")
    if chunks.folder is None:
        pytest.skip("no /dev/shm")
    folder = chunks.folder
    try:
        folder.chmod(0o777)
        assert HostChunks(1, 2, f"{os.getpid()}-test-private").folder is None
        folder.chmod(0o700)
        make_private(folder)
        assert HostChunks(1, 2, f"{os.getpid()}-test-private").folder == folder
        assert chunks.get("a", lambda: np.arange(3)).tolist() == [0, 1, 2]
    finally:
        chunks.close()
