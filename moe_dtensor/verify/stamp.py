"""The stamp: what ``verify --stamp`` leaves in a run's folder for its checkpoints to carry, and what the proof in a
checkpoint still holds for, held against the code, config, data and torch that are here. To read it needs no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dtensor.checkpoint.folder import INDEX, MANIFEST, damage, step_folder, whole_steps, write_small
from moe_dtensor.checkpoint.proof import FORMAT, PROOF_FILE, STAMP_FILE, code_hashes, read_proof, torch_version
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import build, dump, load
from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import all_fields
from moe_dtensor.train.kept_config import comparable, with_defaults

if TYPE_CHECKING:
    from moe_dtensor.verify.verdict import Verdict

CONFIG_FILE = "config.toml"
NOT_COMPUTED = ("run", "data", "lr_scheduler", "checkpoint", "metrics", "profiling", "comm")
"""Tables that a proof does not depend on; data are compared by their fingerprint."""
NOT_COMPARED = (
    *("model.vocab_size", "model.init_std", "optimizer.lr", "mesh.dp", "mesh.pp", "mesh.tp", "mesh.link_bandwidth"),
    *("mesh.device_memory", "training.routing_drift_interval"),
    *("pipeline.schedule", "training.steps", "training.seed", "training.validation_interval"),
    *("training.validation_sequences", "training.check_replicas", "training.max_skipped", "training.nonfinite"),
    "training.deterministic",
)
"""Keys that ``verify`` sets itself, or that change nothing in a step. Meshes and schedules are told by themselves."""
AS_GIVEN = ("mesh", "pipeline", "fsdp")
"""Tables that resolve by the mesh: compared as they were written."""


def write_stamp(folder: Path, config: Config, verdicts: Sequence[Verdict], how: dict[str, Any]) -> Path:
    """Replace the run's stamp, also where the verdict is a bad one.

    Args:
        folder: of the run; made when needed.
        config: as it was given, not the miniature.
        verdicts: one for each mesh and schedule.
        how: dtype, backend, compiled, exact.

    Raises:
        ConfigError: the folder cannot be written.
    """
    from moe_dtensor.bench.measure import provenance

    rests_on = provenance()
    content = {
        "format": FORMAT,
        "ok": all(v.ok for v in verdicts),
        "agree": sum(v.ok for v in verdicts),
        "of": len(verdicts),
        **how,
        "layouts": [[v.mesh, v.schedule] for v in verdicts if v.ok],
        "differ": [_told(v) for v in verdicts if not v.ok],
        "config": dump(config),
        "code": code_hashes(),
        "torch": torch_version(),
        **{key: rests_on[key] for key in ("date", "commit", "device", "versions")},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_small(folder / STAMP_FILE, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{folder / STAMP_FILE} cannot be written: {error.strerror}.", "Name a run's folder after --stamp."
        ) from None
    return folder / STAMP_FILE


def _told(verdict: Verdict) -> str:
    what = verdict.failure.strip().splitlines()[-1] if verdict.failure else f"{verdict.worst.kind} {verdict.worst.name}"
    return f"{verdict.mesh} {verdict.schedule}: {what}"


@dataclass(frozen=True)
class Carrier:
    """A checkpoint or an exported folder."""

    path: Path
    proof: Mapping[str, Any] | None
    here: Config | None
    """The config that it lies beside, or that was given."""
    damage: str
    """What is wrong with its files."""


@dataclass(frozen=True)
class Finding:
    """A line of what ``check --checkpoint`` prints. ``ok`` is None for what is only told."""

    what: str
    ok: bool | None
    text: str


def find_carrier(path: Path, given: Config | None) -> Carrier:
    """The checkpoint that a run's folder, its folder of checkpoints or a step's folder names, or an exported folder.

    Raises:
        ConfigError: there is no such folder, or it is none of these.
    """
    remedy = "Give a run's folder, one of its step-<step> folders, or a folder made by convert or checkpoint.export_hf."
    if not path.is_dir():
        raise ConfigError(f"--checkpoint {path}: there is no such folder.", remedy)
    above = next((f for f in (path, *path.resolve().parents[:3]) if (f / CONFIG_FILE).is_file()), None)
    here = given or (load(above / CONFIG_FILE) if above else None)
    place = path
    if above == path and here is not None and not (path / PROOF_FILE).is_file():
        place = path / here.checkpoint.folder
    if steps := whole_steps(place):
        place = step_folder(place, steps[-1])
    native = (place / MANIFEST).is_file() or (place / INDEX).is_file()
    if not (native or (place / PROOF_FILE).is_file() or (place / "config.json").is_file()):
        raise ConfigError(f"--checkpoint {path} holds no checkpoint.", remedy)
    wrong = damage(place, contents=True) if native else ""
    try:
        proof = read_proof(place)
    except (OSError, ValueError) as error:
        wrong, proof = wrong or f"{PROOF_FILE} cannot be read: {error}", None
    return Carrier(place, proof, here, wrong)


def findings(carrier: Carrier) -> Iterator[Finding]:
    """Everything that is told of a carrier, in the order in which it is."""
    yield Finding("files", not carrier.damage, carrier.damage or "whole")
    if carrier.proof is None:
        yield Finding("proof", False, "none: it was saved by a version without, or is not this program's")
        return
    stamp, saved = carrier.proof["stamp"], carrier.proof["saved"]
    yield Finding("saved", None, f"step {saved['step']} on {saved['mesh']}, {saved['device']}, {saved['date']}")
    yield from _routing(saved)
    yield from _verdict(stamp)
    proven = stamp or {}
    yield _compare("code", proven.get("code"), saved["code"], code_hashes(), lambda room, _: room)
    here = _settings(dump(carrier.here)) if carrier.here else None
    settings = _settings(stamp["config"]) if stamp else None
    yield _compare("config", settings, _settings(saved["config"]), here, lambda key, value: f"{key} = {value!r}")
    yield _data(saved, carrier.here or build(tomllib.loads(saved["config"])))
    torches = [{"torch": version} for version in (proven.get("torch", saved["torch"]), saved["torch"], torch_version())]
    yield _compare("torch", torches[0], torches[1], torches[2], lambda _, value: value)
    if stamp:
        yield _mesh(stamp, saved)


def _verdict(stamp: Mapping[str, Any] | None) -> Iterator[Finding]:
    if stamp is None:
        yield Finding("proof", False, "none: the run had no stamp when this was saved (verify --stamp RUN)")
        return
    told = f"{stamp['agree']} of {stamp['of']} meshes and schedules agree with the oracle in {stamp['dtype']}"
    compiled = ", compiled" if stamp["compiled"] else ""
    differ = f"; {'; '.join(stamp['differ'])}" if stamp["differ"] else ""
    commit = f", commit {stamp['commit'][:12]}" if stamp["commit"] else ""
    yield Finding("proof", stamp["ok"], f"{told}{compiled}, {stamp['device']}, {stamp['date']}{commit}{differ}")


def _routing(saved: Mapping[str, Any]) -> Iterator[Finding]:
    lists = {name: value for name, value in saved["routing"].items() if isinstance(value, list) and value}
    values = {name: value for name, value in lists.items() if not isinstance(value[0], str)}
    if values:
        told = ", ".join(f"{name} {max(value):.4g}" for name, value in values.items())
        yield Finding("routing", None, f"the highest of {len(next(iter(values.values())))} MoE blocks: {told}")


def _compare(what: str, proven: Mapping | None, saved: Mapping, here: Mapping | None, show: Any) -> Finding:
    """What differs between what was proven, what saved the checkpoint and what is here."""
    told: list[str] = []
    for then, now, words in ((proven, saved, "proven, {} saved"), (saved, here, "saved, {} here")):
        if then is None or now is None:
            continue
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                other = show(key, now.get(key))
                told.append(f"{show(key, then.get(key))} {words.format('another' if what == 'code' else other)}")
    rest = "" if here is not None else "; there is none here to compare with"
    return Finding(what, not told, f"no longer matches: {'; '.join(told)}" if told else f"matches{rest}")


def _settings(toml: str) -> dict[str, Any]:
    """The keys that decide what is computed, resolved, so that 0 and what it stands for are alike."""
    tables = tomllib.loads(toml)
    resolved = with_defaults(tables)
    found = {}
    for key, field in all_fields().items():
        if field.table in NOT_COMPUTED or key in NOT_COMPARED:
            continue
        given = tables.get(field.table, {}).get(field.name, comparable(field.default))
        found[key] = given if field.table in AS_GIVEN else comparable(resolved[field.table][field.name])
    return found | {"data.document_mask": resolved["data"]["document_mask"]}


def _data(saved: Mapping[str, Any], config: Config) -> Finding:
    from moe_dtensor.data import build_corpus

    try:
        found = build_corpus(config).fingerprint()
    except (ConfigError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding("data", None, f"{saved['data']}, not compared: they cannot be read here: {reason}")
    if found == saved["data"]:
        return Finding("data", True, "matches")
    return Finding("data", False, f"no longer matches: fingerprint {saved['data']} saved, {found} here")


def _mesh(stamp: Mapping[str, Any], saved: Mapping[str, Any]) -> Finding:
    """A mesh is proven by itself, or by one that splits the same axes: verify's ranks are few."""
    mesh, schedule = saved["mesh"], saved["schedule"]
    word = f"{mesh} {schedule}" if schedule != "none" else mesh
    if [mesh, schedule] in stamp["layouts"]:
        return Finding("mesh", True, f"{word} was proven")
    like = [m for m, s in stamp["layouts"] if s == schedule and _axes(m) == _axes(mesh)]
    if like:
        return Finding("mesh", True, f"{word} splits what {like[0]} does, which was proven")
    return Finding("mesh", False, f"{word} was not proven, nor a mesh that splits the same axes with the same schedule")


def _axes(mesh: str) -> tuple[bool, ...]:
    return tuple(int(size) > 1 for size in mesh.split("x"))
