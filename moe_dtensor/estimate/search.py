"""The best meshes, placements, schedules and recomputation for so many devices, by arithmetic. Loads no torch.

Two rounds. The first tries every mesh with every placement of experts, as thrifty as can be (everything recomputed,
one sequence in a forward); the second tries the rest of the choices around the best of each mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import moe_layers, resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate.dispatch import settle
from moe_dtensor.estimate.memory import Memory, fullest_rank, settle_accumulate
from moe_dtensor.estimate.speed import Routing, Speeds, StepTime, step_time, tokens_per_second

GIB = 2**30
RESERVE = 4.5
"""GiB of a device that the plan's peak leaves: the CUDA context, NCCL's buffers, what the allocator holds unused."""
REFINED = 6
"""Meshes that the second round works on."""
Keys = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to run the config."""

    keys: Keys
    """What it changes, by key."""
    config: Config
    """Resolved and settled."""
    memory: Memory
    """Of the fullest rank, tokens spread evenly."""
    speeds: Speeds

    @property
    def mesh(self) -> str:
        """``8x2x4``."""
        mesh = self.config.mesh
        return f"{mesh.dp}x{mesh.pp}x{mesh.tp}"

    @property
    def skewed_peak(self) -> int:
        """Bytes at most, all tokens at one rank's experts."""
        return fullest_rank(self.config, skewed=True)[1].peak

    def time(self, routing: Routing) -> StepTime:
        """Of a step."""
        return step_time(self.config, self.speeds, routing)

    def speed(self, routing: Routing) -> float:
        """Tokens/s of all devices together."""
        return tokens_per_second(self.config, self.time(routing))


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: list[Candidate]
    """That fit, the fastest first; of each mesh and placement the best only."""
    too_large: list[Candidate]
    """The thriftiest of each mesh of which nothing fits, the smallest first."""
    refused: dict[str, str]
    """Of each mesh that cannot run the config at all, the rule that it breaks."""
    tried: int


def search(config: Config, devices: int, memory: float, speeds: Speeds, routing: Routing) -> Found:
    """Candidates of a config that names its vocabulary.

    Args:
        config: not resolved; what it says of mesh, pipeline, recomputation and microbatch is a start only.
        devices: ranks.
        memory: GiB of one.
        speeds: of machines and links.
        routing: by which candidates are ranked.
    """
    limit = (memory - RESERVE) * GIB
    config = override(config, {"mesh.device_memory": memory - RESERVE, "fsdp.accumulate": "auto"} | RESET)
    fitting: dict[str, list[Candidate]] = {}
    too_large: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    tried = 0
    for keys in _first_round(config, devices, speeds):
        mesh = "x".join(str(keys[f"mesh.{axis}"]) for axis in ("dp", "pp", "tp"))
        tried += 1
        try:
            found = evaluate(config, keys, devices, speeds)
        except ConfigError as error:
            refused.setdefault(mesh, error.problem)
            continue
        if found.memory.peak <= limit:
            fitting.setdefault(mesh, []).append(found)
        elif mesh not in too_large or found.memory.peak < too_large[mesh].memory.peak:
            too_large[mesh] = found
    order = sorted(fitting, key=lambda mesh: -max(c.speed(routing) for c in fitting[mesh]))
    best: list[Candidate] = []
    for place, mesh in enumerate(order):
        of_mesh = sorted(_of_each_placement(fitting[mesh], routing), key=lambda c: -c.speed(routing))
        refined = 2 if place < REFINED else 0
        for candidate in of_mesh[:refined]:
            for keys in _second_round(config, candidate.keys):
                tried += 1
                try:
                    found = evaluate(config, keys, devices, speeds)
                except ConfigError:
                    continue
                if found.memory.peak <= limit and found.speed(routing) > candidate.speed(routing):
                    candidate = found
            best.append(candidate)
        best += of_mesh[refined:]
    seen = fitting.keys()
    return Found(
        best=sorted(best, key=lambda c: -c.speed(routing)),
        too_large=sorted((c for m, c in too_large.items() if m not in seen), key=lambda c: c.memory.peak),
        refused={m: rule for m, rule in refused.items() if m not in seen and m not in too_large},
        tried=tried,
    )


RESET: Keys = {
    "mesh.dp_replicate": 1,
    "mesh.expert_ranks": 0,
    "mesh.expert_weights": "replicated",
    "mesh.lent_experts": 0,
    "mesh.attention": "heads",
    "mesh.dispatch": "auto",
    "fsdp.reshard_after_forward": "auto",
    "pipeline.stages_per_rank": 0,
}
"""Choices that the search makes itself; it lends no experts."""


def evaluate(config: Config, keys: Keys, devices: int, speeds: Speeds) -> Candidate:
    """A config with some keys changed.

    Raises:
        ConfigError: so many ranks cannot run it.
    """
    changed = override(config, keys)
    check(changed, devices, here=False)
    changed = settle_accumulate(settle(resolve(changed, devices)))
    return Candidate(
        keys=keys,
        config=changed,
        memory=fullest_rank(changed)[1],
        speeds=speeds,
    )


def _of_each_placement(candidates: list[Candidate], routing: Routing) -> list[Candidate]:
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        place = candidate.config.mesh.experts
        if place not in best or candidate.speed(routing) > best[place].speed(routing):
            best[place] = candidate
    return list(best.values())


def _first_round(config: Config, devices: int, speeds: Speeds) -> Iterator[Keys]:
    thrifty = {"training.microbatch_size": 1, "activation_checkpoint.mode": "full"}
    group = config.moe.group_sequences
    if group:
        thrifty["training.microbatch_size"] = group
    for tp in _divisors(devices, speeds.host):
        for pp in _divisors(devices // tp, config.model.num_layers):
            dp = devices // tp // pp
            mesh = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp}
            schedule = {"pipeline.schedule": "1F1B"} if pp > 1 else {}
            for place in _placements(config, dp, pp, tp, speeds):
                yield thrifty | mesh | schedule | place


def _placements(config: Config, dp: int, pp: int, tp: int, speeds: Speeds) -> Iterator[Keys]:
    """Where experts live, and whether dp has two levels: with shards inside a host."""
    in_host = speeds.host // (pp * tp)
    copies = [1]
    if 1 < in_host < dp and dp % in_host == 0:
        copies.append(dp // in_host)
    for count in copies:
        levels = {"mesh.dp_replicate": count}
        yield levels | {"mesh.experts": "tp"}
        if not moe_layers(config):
            continue
        if tp > 1:
            yield levels | {"mesh.experts": "tp_hidden"}
        if dp > 1:
            for place in ("dp", "dp_tp") if tp > 1 else ("dp",):
                most = dp // count
                # One rank that holds all experts, or all of a tp group's, is experts = tp.
                for ranks in sorted({most, min(most, in_host), min(most, 8), min(most, 32)} - {0, 1}, reverse=True):
                    for weights in ("replicated", "sharded") if ranks < most else ("replicated",):
                        shared = {"mesh.experts": place, "mesh.expert_ranks": ranks, "mesh.expert_weights": weights}
                        yield levels | shared


def _second_round(config: Config, keys: Keys) -> Iterator[Keys]:
    """Around one candidate: sequences in a forward, recomputation, schedule, what tp divides attention by."""
    schedules: tuple[str, ...] = ("1F1B", "Interleaved1F1B")
    if not config.compile.enable:
        schedules += ("ZBVZeroBubble", "DualPipeV")
    sizes = [keys["training.microbatch_size"] * n for n in (1, 2, 4, 8)]
    for attention, size, mode, schedule in product(
        ("heads", "sequences") if keys["mesh.tp"] > 1 else ("heads",),
        sizes,
        ("none", "selective", "full"),
        schedules if keys["mesh.pp"] > 1 else ("",),
    ):
        changed = {"training.microbatch_size": size, "activation_checkpoint.mode": mode, "mesh.attention": attention}
        yield keys | changed | ({"pipeline.schedule": schedule} if schedule else {})


def _divisors(whole: int, most: int) -> list[int]:
    return [n for n in range(1, min(whole, most) + 1) if whole % n == 0]
