"""The config that a run's folder keeps, and whether another config goes on with that run."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

from moe_dtensor.config.load import build
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config, Source
from moe_dtensor.config.tables import tables


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


_FREE_KEYS = {
    "model": {"attention_backend"},
    "rope": set[str](),
    # How experts are computed changes no bit, but for what their products read; that, and how experts are balanced, may
    # be tuned on the way, as the optimizer may.
    "moe": {
        "backend",
        "expert_dtype",
        "rows",
        "keep_rows",
        "balance_loss",
        "balance_over",
        "z_loss",
        "bias_rate",
        "jitter",
    },
}
_FIXED_KEYS = {
    "data": ("document_mask", "packing", "too_long", "sources"),
    "training": ("seed", "seq_len", "global_batch_size", "dtype", "loss"),
}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that make ``new`` another run than ``old``, as ``table.key = old there, new here``.

    Fixed are [model], [rope] and [moe] but for how it is computed and balanced, and of [data] and [training] what
    decides a step's tokens and the master weights' precision. A key that ``old``, written by an older version, lacks
    counts as its default there. ``old`` is what a run's config.toml holds, ``new`` the tables of a resolved config.
    """
    old, new = with_defaults(old), with_defaults(new)
    keys = [(table, key) for table, free in _FREE_KEYS.items() for key in new[table] if key not in free]
    keys += [(table, key) for table, fixed in _FIXED_KEYS.items() for key in fixed]
    pairs = [(f"{table}.{key}", comparable(old[table][key]), comparable(new[table][key])) for table, key in keys]
    if new["data"]["corpus"] == "datasets" and bool(old["data"]["validation_path"]) != bool(
        new["data"]["validation_path"]
    ):
        # Without it a twentieth of the stream is held out, with it the whole is trained on.
        pairs.append(("data.validation_path", old["data"]["validation_path"], new["data"]["validation_path"]))
    return [f"{name} = {there!r} there, {here!r} here" for name, there, here in pairs if there != here]


def changed_past(old: dict[str, Any], new: dict[str, Any], steps: int) -> list[str]:
    """What of the data's order in the first ``steps`` steps ``new`` would change; arguments as :func:`differences`."""
    old, new = with_defaults(old), with_defaults(new)
    begun, now = ([stage for stage in x["stages"] if stage["from_step"] <= steps] for x in (old, new))
    found = [f"stages up to step {steps} = {begun!r} there, {now!r} here"] if begun != now else []
    there, here = old["training"]["steps"], new["training"]["steps"]
    if there != here and any(source["tokens"] for source in new["data"]["sources"]):
        found.append(f"training.steps = {there} there, {here} here, of which data.sources.*.tokens are shares")
    return found


def data_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys of ``[data]`` that differ, named where the data do."""
    return [
        f"data.{key} = {old['data'].get(key)!r} there, {value!r} here"
        for key, value in new["data"].items()
        if old["data"].get(key) != value
    ]


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The tables of a run's config.toml with every key of today: unknown ones left out, missing ones at their default.

    Defaults are resolved as any config's; what hangs on the number of ranks plays no part in a comparison.
    """
    known = {
        name: {key: value for key, value in values.get(name, {}).items() if key in table.fields}
        for name, table in tables().items()
    }
    known["data"] |= {"sources": values.get("data", {}).get("sources", ())}
    known["eval"] |= {"sets": values.get("eval", {}).get("sets", ())}
    return asdict(resolve(build({**known, "stages": values.get("stages", ())}), 1))


def comparable(value: Any) -> Any:
    """The value as TOML gives it back; of sources without their places, for which the data's fingerprint stands."""
    if isinstance(value, list | tuple):
        return [comparable(entry) for entry in value]
    if isinstance(value, dict):
        return {key: entry for key, entry in value.items() if key not in ("path", "validation_path", "revision")}
    return value
