"""The config that a run's folder keeps."""

from __future__ import annotations

import os
from dataclasses import replace

from moe_dtensor.config.schema import Config, Source


def to_keep(config: Config, given: Config) -> Config:
    """The config to keep: started from there, the run resumes on any mesh and from any folder.

    Args:
        config: resolved.
        given: before it was: what hangs on the mesh is kept as it stands there.
    """
    data = config.data
    return replace(
        config,
        run=replace(config.run, fresh=False),
        mesh=replace(config.mesh, dp=given.mesh.dp),
        pipeline=replace(config.pipeline, stages_per_rank=given.pipeline.stages_per_rank),
        fsdp=replace(config.fsdp, reshard_after_forward=given.fsdp.reshard_after_forward),
        data=replace(
            data,
            path=absolute(data.path),
            validation_path=absolute(data.validation_path),
            tokenizer=absolute(data.tokenizer),
            sources=tuple(map(_absolute_source, data.sources)),
        ),
        checkpoint=replace(config.checkpoint, initial=absolute(config.checkpoint.initial)),
    )


def _absolute_source(source: Source) -> Source:
    return replace(source, path=absolute(source.path), validation_path=absolute(source.validation_path))


def absolute(path: str) -> str:
    """A path that leads to something, from everywhere, with the split that may follow it; other names stay."""
    place, at, split = path.rpartition("@")
    for name, rest in ((path, ""), (place, at + split)):
        full = os.path.expanduser(name)
        if name not in ("", "bytes") and (os.path.exists(full) or any(c in name for c in "*?[")):
            return os.path.abspath(full) + rest
    return path
