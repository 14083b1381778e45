"""Run folders as tests make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_dtensor.config.schema import Config, Run
from moe_dtensor.train.run_folder import RunFolder, open_run_folder


def config_of(folder: Path, **tables: dict[str, Any]) -> Config:
    config = Config(run=Run(folder=str(folder)))
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in tables.items()})


def save_checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{step:08d}" / ".metadata").touch()


def begun(config: Config, data: str = "text", steps: int = 0) -> RunFolder:
    """A run that took its first step, and ended."""
    run = open_run_folder(config, data)
    run.begin(steps)
    run.close()
    return run


def opened(config: Config, data: str = "text") -> RunFolder:
    """A start that is looked at, and ends before its first step."""
    run = open_run_folder(config, data)
    run.close()
    return run
