"""A window of torch.profiler inside a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moe_dtensor.config.schema import Profiling

PROFILE_FOLDER = "profile"


class Profiler:
    """Records the steps of ``[profiling]`` into a Chrome trace (chrome://tracing, Perfetto).

    The window begins at ``first_step``, or with the first step taken where the run resumes later than that.

    Args:
        config: ``[profiling]``.
        folder: of the run; the trace is ``profile/steps-<first>-<last>.json`` in it.
        rank: rank 0 alone records.
    """

    def __init__(self, config: Profiling, folder: Path, rank: int = 0) -> None:
        self._enabled = config.enable and rank == 0
        self._first = config.first_step
        self._num_steps = config.steps
        self._folder = folder / PROFILE_FOLDER
        self._profile: profile | None = None
        self._last = 0

    def before_step(self, step: int) -> None:
        """Start to record if the window begins with ``step``."""
        if not self._enabled or self._profile is not None or step < self._first:
            return
        self._enabled = False
        self._first = step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def after_step(self, step: int) -> Path | None:
        """Write the trace if ``step`` was the window's last; returns its path then."""
        self._last = step
        if self._profile is not None and step >= self._first + self._num_steps - 1:
            return self.close()
        return None

    def close(self) -> Path | None:
        """Write the trace of a window that the run's end cut short; returns its path."""
        if self._profile is None:
            return None
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._last}.json"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        return path
