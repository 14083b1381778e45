"""Who holds a run: one process at a time may write into a run's folder.

The file ``.lease.json`` names the holder and is renewed by it every few seconds, through the file it once opened: a
process that was frozen while another took over renews a file that nobody reads any more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError, RunError

LEASE_FILE = ".lease.json"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A holder that has not renewed for so long is dead or frozen, and loses the run."""
_LENGTH = 512


class Lease:
    """The right to write into ``folder``, taken on construction.

    Args:
        folder: of the run; exists.
        start_id: of this start.

    Raises:
        ConfigError: a living process holds the run.
    """

    def __init__(self, folder: Path, start_id: str) -> None:
        self._path = folder / LEASE_FILE
        self._lock = threading.Lock()
        self._renewed = time.time()
        self._late = False
        """Whether it was once not renewed for so long that another process may have had the run since."""
        self._record: dict[str, Any] = {
            "start": start_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "process": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        while True:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:
                self._take_over()
        self._renew()
        self._stop = threading.Event()
        threading.Thread(target=self._renew_on, daemon=True).start()

    def check(self) -> None:
        """Raise RunError if another process has taken the run over.

        A lease that cannot be read, or is gone, tells of another process only where this one was late to renew it.
        """
        holder = _read(self._path)
        late = self._late or time.time() - self._renewed > STALE_SECONDS
        if holder.get("start") != self._record["start"] and (holder or late):
            raise RunError(
                f"this process lost the run in {str(self._path.parent)!r} to {_name(holder)}: it did not renew its "
                f"lease for {STALE_SECONDS:.0f} s (frozen, or cut off from the file system).",
                "Nothing was written since; let the other process end.",
            )

    def release(self) -> None:
        """Give the run back, if it is still held."""
        self._stop.set()
        with self._lock:
            if self._file >= 0 and _read(self._path).get("start") == self._record["start"]:
                self._path.unlink(missing_ok=True)
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _renew(self) -> None:
        with self._lock:
            now = time.time()
            self._late |= now - self._renewed > STALE_SECONDS
            if self._file >= 0:
                text = json.dumps({**self._record, "renewed": now})
                os.pwrite(self._file, text.ljust(_LENGTH).encode(), 0)
            self._renewed = now

    def _renew_on(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._renew()
            except OSError:
                continue  # a full or absent disk: the next time, or the lease is lost

    def _take_over(self) -> None:
        """Put a dead holder's lease away; of several that try, one succeeds."""
        holder = _read(self._path)
        if not _is_gone(holder):
            end = time.monotonic() + STALE_SECONDS
            while time.monotonic() < end:
                time.sleep(0.5)
                now = _read(self._path)
                if not now or now.get("start") != holder.get("start") or _is_gone(now):
                    break
                if now.get("renewed") != holder.get("renewed"):
                    raise ConfigError(
                        f"the run in {str(self._path.parent)!r} is held by {_name(now)}.",
                        "Wait for it or end it, or set run.folder to another folder.",
                    )
        away = self._path.with_name(f"{LEASE_FILE}.{self._record['start']}")
        try:
            if _read(self._path).get("start") == holder.get("start"):
                os.rename(self._path, away)
                away.unlink(missing_ok=True)
        except FileNotFoundError:
            pass


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _read(path: Path) -> dict[str, Any]:
    """The holder, or nothing where the file is absent or being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that does not run any more."""
    return holder.get("machine") == _machine() and _process_start(holder.get("pid", -1)) != holder.get("process")


def _machine() -> str:
    """This start of this machine, and the space of its process ids (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
