"""Folders in places that other users write into, too: this user's alone, or not used."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder that only this user may read and write, or take one that is.

    Raises:
        OSError: it cannot be made; or what is there is a link, another user's, or open to others. Whoever can write
            into it could have this program read their tokens as its own.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(0, "it is no folder of its own but a link", str(folder))
    if found.st_uid != os.getuid():
        raise PermissionError(0, f"it belongs to user {found.st_uid}", str(folder))
    if found.st_mode & 0o022:
        raise PermissionError(0, f"others may write into it (mode {stat.S_IMODE(found.st_mode):o})", str(folder))
