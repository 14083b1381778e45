"""When a process ends by another's will: with the one that started it, or when a signal asks for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from moe_dtensor.config.errors import AGAIN

_PR_SET_PDEATHSIG = 1
ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to save and end."""


def end_with_parent() -> None:
    """On Linux, have the system kill this process when the one that started it is gone."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it went before this was asked for
        os._exit(1)


def on_asking(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the signals of ``ASKING``, but for SIGHUP under nohup; in a thread other than the main one, none."""
    with contextlib.suppress(ValueError):
        for number in ASKING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


def end_when_asked() -> None:
    """While nothing can be lost yet (torch takes seconds to load): end on a signal, and say that it may start again."""
    on_asking(lambda number, frame: os._exit(AGAIN))
