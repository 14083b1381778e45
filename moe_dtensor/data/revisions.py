"""Which commit of a dataset on the hub a run reads: found once, when the run begins, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data, Source
from moe_dtensor.data.hub import check_name, is_local, repository


def pin_revisions(config: Config, kept: Mapping[str, str] | None) -> Config:
    """Fill in the commit of every hub name of ``[data]`` and its sources, so that a run reads the same for ever.

    Args:
        config: of the run.
        kept: by path, the revisions of the run that goes on; they stand where the config names none.

    Raises:
        ConfigError: the hub cannot be asked, or has no such name or revision.
    """

    def pinned(key: str, part: Data | Source) -> str:
        if part.corpus != "datasets" or is_local(part.path):
            return part.revision
        if not part.revision and kept is not None and part.path in kept:
            return kept[part.path]
        return find_commit(f"{key}.path", part.path, part.revision)

    data = config.data
    if data.sources:
        sources = tuple(replace(s, revision=pinned(f"data.sources.{s.name}", s)) for s in data.sources)
        return replace(config, data=replace(data, sources=sources))
    return replace(config, data=replace(data, revision=pinned("data", data)))


def reads_hub(config: Config) -> bool:
    """Whether something of ``[data]`` is read from the hub."""
    return any(part.corpus == "datasets" and not is_local(part.path) for part in config.data.sources or (config.data,))


def find_commit(key: str, path: str, revision: str) -> str:
    """The commit that ``revision`` of a hub name is now; the newest if it is empty."""
    check_name(key, path)
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository(path), revision=revision or None).sha or ""
    except Exception as error:  # offline, no such name or revision: the cause is in the message
        of = f" (revision {revision!r})" if revision else ""
        raise ConfigError(
            f"{key} = {path!r}{of} must be a dataset on the hub; "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            f"Check {key}, its revision, and the network.",
        ) from error
