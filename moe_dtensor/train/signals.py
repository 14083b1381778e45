"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
from types import FrameType

from moe_dtensor.config.errors import AGAIN
from moe_dtensor.orphans import on_asking
from moe_dtensor.train.ranks import Ended


class EndRequest:
    """Whether this rank was asked to end.

    Before the first step (:meth:`from_now_on_save`) nothing would be lost, and a signal ends the rank where it is;
    later it is noted, and the ranks that look at it together save and end. A second SIGINT ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The signal that asked; 0: none did."""
        self._saves = False

    def listen(self) -> None:
        """Handle the signals that ask for an end."""
        on_asking(self._on_signal)

    def from_now_on_save(self) -> None:
        """From here on a signal is noted only."""
        self._saves = True

    @property
    def name(self) -> str:
        """The signal's name; empty on a rank that got none."""
        return signal.Signals(self.signal).name if self.signal else ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        first, self.signal = not self.signal, number
        if not self._saves and first:
            raise Ended(AGAIN, f"Ended by {self.name} before the first step; the same command starts again.")
