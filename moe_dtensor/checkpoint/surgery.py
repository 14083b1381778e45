"""Experts taken out of a mixture, merged, or added. Every tensor that has a row for each expert changes alike.

A change is described by a :class:`Cut` for each MoE block: which old experts each new one is made of. Of the
optimizer's state a new expert that is one old one, unchanged, keeps its rows; for others they are 0.

E experts before, N after, D width, L MoE blocks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config

PER_EXPERT = re.compile(
    r"layers\.(\d+)\.moe\.(router\.(?:weight|logit_bias)|experts\.(?:w_up|w_down|up_bias)|down_bias)"
)
"""Parameters whose first dimension is the experts."""


@dataclass(frozen=True)
class Cut:
    """One MoE block. For each of N new experts the old ones it is the mean of, and by what weights."""

    sources: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    new: tuple[int, ...] = ()
    """New experts that are copies, to be told from their originals by noise."""

    @property
    def survivors(self) -> list[tuple[int, int]]:
        """(new, old) of experts that stay what they were."""
        return [(n, old[0]) for n, old in enumerate(self.sources) if len(old) == 1 and n not in self.new]


def keep(experts: Sequence[int]) -> Cut:
    """Experts that stay, in this order."""
    return Cut(tuple((e,) for e in experts), ((1.0,),) * len(experts))


def prune(experts: int, removed: Sequence[int]) -> Cut:
    """Without some."""
    return keep([e for e in range(experts) if e not in set(removed)])


def least_loaded(load_E: Tensor, count: int) -> list[int]:
    """The experts that were sent the fewest copies, of equal ones the later."""
    order = sorted(range(len(load_E)), key=lambda e: (float(load_E[e]), -e))
    return sorted(order[:count])


def merge(router_ED: Tensor, load_E: Tensor, count: int) -> Cut:
    """Down to ``count``: the most loaded stay, and each other joins the one whose router row is most like its own; a
    group becomes its mean by load (M-SMoE, arXiv:2310.01334, without its alignment of hidden units)."""
    experts = len(load_E)
    gone = set(least_loaded(load_E, experts - count))
    groups = {e: [e] for e in range(experts) if e not in gone}
    unit_ED = torch.nn.functional.normalize(router_ED.double(), dim=1)
    for e in sorted(gone):
        groups[max(groups, key=lambda d: (float(unit_ED[e] @ unit_ED[d]), -d))].append(e)
    return merge_groups(load_E, list(groups.values()))


def merge_groups(load_E: Tensor, groups: Sequence[Sequence[int]]) -> Cut:
    """Each group of experts becomes one, their mean by load (a plain mean where none had any)."""
    weights = []
    for group in groups:
        loads = [float(load_E[e]) for e in group]
        total = sum(loads)
        weights.append(tuple(x / total if total else 1 / len(group) for x in loads))
    return Cut(tuple(tuple(group) for group in groups), tuple(weights))


def add(load_E: Tensor, count: int) -> Cut:
    """``count`` copies more. Of every expert equally many, after each expert its own, if ``count`` is a multiple of E;
    else of the most loaded, at the end."""
    experts = len(load_E)
    each, rest = divmod(count, experts)
    if rest == 0:
        sources = [e for e in range(experts) for _ in range(each + 1)]
        new = [n for n in range(len(sources)) if n % (each + 1)]
    else:
        busy = sorted(range(experts), key=lambda e: (-float(load_E[e]), e))
        sources = [*range(experts), *(busy[i % experts] for i in range(count))]
        new = list(range(experts, experts + count))
    return Cut(tuple((e,) for e in sources), ((1.0,),) * len(sources), tuple(new))


def cut_config(config: Config, cuts: Mapping[int, Cut]) -> Config:
    """The config afterwards. Where all experts are copied equally often, a token goes to all copies of its experts, so
    that the model stays what it is.

    Args:
        config: resolved.
        cuts: by the block's index.

    Raises:
        ConfigError: the mixture cannot be cut so, or would have fewer experts than a token is sent to.
    """
    moe = config.moe
    if not moe.num_experts:
        raise ConfigError("the model is dense: it has no experts to cut.", "Make some with --upcycle.")
    if moe.expert_groups:
        raise ConfigError(
            f"moe.expert_groups = {moe.expert_groups}: other experts would fall into other groups.",
            "Take moe.expert_groups out of the folder's config.toml first, if the choice may be among all.",
        )
    _check(config, cuts)
    cut = next(iter(cuts.values()))
    experts, top_k, scale = len(cut.sources), moe.top_k, moe.gate_scale
    times = _copied(config, cut)
    if times > 1:
        top_k *= times
        # Softmax shares a probability out among copies; sigmoids do not, unless they are made to sum to 1.
        scale = scale / times if moe.score == "sigmoid" and not moe.normalize_gates else scale
    if experts < top_k:
        raise ConfigError(
            f"{experts} experts are fewer than moe.top_k = {top_k}.", f"Keep {top_k} or more, or lower moe.top_k first."
        )
    by_layer = tuple(k * max(times, 1) for k in moe.top_k_by_layer)
    changed = replace(moe, num_experts=experts, top_k=top_k, top_k_by_layer=by_layer, gate_scale=scale)
    return replace(config, moe=changed)


def cut_parameter(name: str, value: Tensor, cuts: Mapping[int, Cut], noise: float = 0.0, seed: int = 0) -> Tensor:
    """A parameter afterwards.

    Args:
        cuts: by the block's index.
        noise: standard deviation of what copies get added, as a share of the parameter's own.
    """
    match = PER_EXPERT.fullmatch(name)
    if match is None:
        return value
    cut = cuts[int(match[1])]
    made = _mean_rows(value, cut)
    if noise:
        digest = hashlib.sha256(f"add/{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        spread = noise * value.float().std()
        for n in cut.new:
            made[n] += (torch.randn(made[n].shape, generator=generator) * spread).to(made.dtype)
    return made


def cut_state(key: str, value: Any, cuts: Mapping[int, Cut]) -> Any:
    """An entry ``state.<parameter>.<moment>`` of the optimizer afterwards."""
    name, _, moment = key.removeprefix("state.").rpartition(".")
    match = PER_EXPERT.fullmatch(name)
    if match is None or moment not in ("exp_avg", "exp_avg_sq", "remainder"):
        return value
    cut = cuts[int(match[1])]
    made = value.new_zeros(len(cut.sources), *value.shape[1:])
    for n, old in cut.survivors:
        made[n] = value[old]
    return made


def _copied(config: Config, cut: Cut) -> int:
    """How often every expert is there then, if all are equally often and only copies were added; else 1."""
    times, rest = divmod(len(cut.sources), config.moe.num_experts)
    return times if cut.new and rest == 0 else 1


def cut_balance(config: Config, balance: Mapping[str, Tensor], cuts: Mapping[int, Cut]) -> dict[str, Tensor]:
    """Biases ``(L, N)`` follow their experts, loads of merged ones add up, those of copies are 0.

    Where copies share a softmax's probability, the bias that is added to it is divided as well.

    Args:
        config: before the cut.
    """
    shared = config.moe.score == "softmax" and config.moe.score_before_top_k
    order = sorted(cuts)
    bias, load = [], []
    for row, layer in enumerate(order):
        cut = cuts[layer]
        bias.append(_mean_rows(balance["bias"][row], cut) / (_copied(config, cut) if shared else 1))
        old = balance["previous_load"][row]
        load.append(torch.stack([old[list(s)].sum() * (n not in cut.new) for n, s in enumerate(cut.sources)]))
    return {"bias": torch.stack(bias), "previous_load": torch.stack(load)}


def _mean_rows(value: Tensor, cut: Cut) -> Tensor:
    rows = []
    for sources, weights in zip(cut.sources, cut.weights, strict=True):
        if len(sources) == 1:
            rows.append(value[sources[0]])
        else:
            wide = value[list(sources)].to(torch.promote_types(value.dtype, torch.float32))
            weight = torch.tensor(weights, dtype=wide.dtype).view(-1, *[1] * (wide.dim() - 1))
            rows.append((wide * weight).sum(0).to(value.dtype))
    return torch.stack(rows)


def _check(config: Config, cuts: Mapping[int, Cut]) -> None:
    """Every MoE block is named, and all come out with equally many experts, each made of ones that there are."""
    experts, layers = config.moe.num_experts, sorted(moe_layers(config))
    if sorted(cuts) != layers:
        raise ConfigError(f"blocks {sorted(cuts)} are named, but the MoE blocks are {layers}.", "Name each of them.")
    sizes = {len(cut.sources) for cut in cuts.values()}
    if len(sizes) > 1:
        raise ConfigError(f"blocks would have {sorted(sizes)} experts.", "Take equally many out of each.")
    for layer, cut in cuts.items():
        used = [e for group in cut.sources for e in group]
        wrong = [e for e in used if not 0 <= e < experts]
        if wrong:
            raise ConfigError(
                f"block {layer} has no expert {wrong[0]}.", f"There are experts 0 to {experts - 1} in every block."
            )
