"""The generated list of routing cases: every pair of choices in ``[moe]`` meets on two different meshes."""

from __future__ import annotations

import functools
from typing import Any

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import FORCED, SPLIT_BACKWARD
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.miniature import Case, Layout

from .mesh_cases import TP_SPLITS, Setting, all_pairs, sequences, tp_keys, with_microbatches

MESH_SETS: tuple[dict[str, tuple[int, int, int]], ...] = (
    {"2x1x2": (2, 1, 2), "1x2x2": (1, 2, 2), "2x2x1": (2, 2, 1)},
    {"1x1x2": (1, 1, 2), "2x1x1": (2, 1, 1)},
)
"""The list is made for each of these sets: what meets in both has met on two meshes. The second has no pipelines."""
SCHEDULES = ("none", "1F1B", "Interleaved1F1B", "ZBVZeroBubble")
ROUTERS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"moe.router": "sinkhorn"},
    "sinkhorn in groups": {"moe.router": "sinkhorn", "moe.group_sequences": 1},
    "topk": {"moe.router": "topk"},
    "expert_choice": {"moe.router": "expert_choice"},
    "hash": {"moe.router": "hash"},
    "uniform": {"moe.router": "uniform"},
    "zipf": {"moe.router": "zipf"},
}
# Coefficients so large that an auxiliary loss is no small part of a gradient, and a rate that changes choices at once.
BALANCES: dict[str, dict[str, Any]] = {
    "none": {},
    "sequence": {"moe.balance_loss": 0.5, "moe.balance_over": "sequence"},
    "group": {"moe.balance_loss": 0.5, "moe.balance_over": "group"},
    "batch": {"moe.balance_loss": 0.5, "moe.balance_over": "batch"},
    "z": {"moe.z_loss": 0.2},
    "bias": {"moe.bias_rate": 0.1},
    "fixed bias": {"moe.selection_bias": True},
    "all": {"moe.balance_loss": 0.5, "moe.balance_over": "batch", "moe.z_loss": 0.2, "moe.bias_rate": 0.1},
}
GATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"moe.normalize_gates": True},
    "after top-k": {"moe.score": "softmax", "moe.score_before_top_k": False},
    "sigmoid": {"moe.score": "sigmoid"},
    "scaled": {"moe.gate_scale": 2.5},
    "sigmoid, normalized, scaled": {"moe.score": "sigmoid", "moe.normalize_gates": True, "moe.gate_scale": 2.5},
}
LIMITS: dict[str, dict[str, Any]] = {
    "none": {},
    "expert groups": {"moe.expert_groups": 4, "moe.expert_groups_kept": 2},
    "expert groups by their best": {
        "moe.expert_groups": 4,
        "moe.expert_groups_kept": 2,
        "moe.group_score": "max",
    },
    "capacity by score": {"moe.capacity_factor": 1.1, "moe.drop_by": "score"},
    "capacity by position": {"moe.capacity_factor": 1.1, "moe.drop_by": "position"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "tp, all_gather": {"mesh.experts": "tp"},
    "tp, all_to_all": {"mesh.experts": "tp", "mesh.dispatch": "all_to_all"},
    "tp_hidden": {"mesh.experts": "tp_hidden"},
    "dp, all_gather": {"mesh.experts": "dp"},
    "dp, all_to_all": {"mesh.experts": "dp", "mesh.dispatch": "all_to_all"},
    "dp_tp, all_gather": {"mesh.experts": "dp_tp"},
    "dp_tp, all_to_all": {"mesh.experts": "dp_tp", "mesh.dispatch": "all_to_all"},
}
ROWS: dict[str, dict[str, Any]] = {"exact": {"moe.rows": "exact"}, "worst": {"moe.rows": "worst"}}
TABLES = {
    "router": ROUTERS,
    "balance": BALANCES,
    "gates": GATES,
    "limits": LIMITS,
    "placement": PLACEMENTS,
    "rows": ROWS,
}
CARRIED = ("batch", "bias", "all")
"""Balances whose state shows in a second step."""


def dimensions(meshes: dict[str, tuple[int, int, int]]) -> dict[str, tuple[Any, ...]]:
    """What is paired, for one set of meshes."""
    return {
        "mesh": tuple(meshes),
        **{name: tuple(table) for name, table in TABLES.items()},
        "schedule": SCHEDULES if any(pp > 1 for _, pp, _ in meshes.values()) else ("none",),
        "accumulation": (1, 2),
        "recompute": ("none", "full", "selective"),
        "jitter": (0.0, 0.1),
        "top_k": (1, 2),
        "by_layer": (False, True),
        "tp_splits": TP_SPLITS,
    }


def possible(meshes: dict[str, tuple[int, int, int]], setting: Setting) -> bool:
    """Whether the values given so far can stand together in one case; dimensions may be absent."""
    s = setting
    if "mesh" in s and "schedule" in s and (meshes[s["mesh"]][1] == 1) != (s["schedule"] == "none"):
        return False
    if "mesh" in s and "placement" in s:
        dp, _, tp = meshes[s["mesh"]]
        # Where its axis has one rank a placement is no choice.
        if {"tp": tp, "tp_hidden": tp, "dp": dp, "dp_tp": dp * tp}[PLACEMENTS[s["placement"]]["mesh.experts"]] == 1:
            return False
    if s.get("recompute") == "selective" and s.get("schedule") in SPLIT_BACKWARD:
        return False
    router, gates, biased = s.get("router"), s.get("gates", "plain"), s.get("balance") in ("bias", "fixed bias", "all")
    sums_to_one = gates in ("normalized", "after top-k", "sigmoid, normalized, scaled")
    if sums_to_one and (s.get("top_k") == 1 or router == "expert_choice"):
        return False
    if biased and router in ("expert_choice", *FORCED):
        return False
    if s.get("limits", "").startswith("expert groups") and router in ("expert_choice", *FORCED):
        return False
    return not (s.get("limits", "none").startswith("capacity") and router == "expert_choice")


def build_case(meshes: dict[str, tuple[int, int, int]], setting: Setting) -> Case:
    """The config of one setting, at miniature size."""
    dp, pp, tp = meshes[setting["mesh"]]
    layout = Layout(dp, pp, tp, setting["schedule"])
    changes = {
        "model.num_layers": pp * (1 if setting["schedule"] in ("none", "1F1B") else 2),
        "model.dim": 16,
        "model.num_heads": 2,
        "model.head_dim": 4,
        "model.vocab_size": 61,
        "moe.num_experts": 8,
        "moe.top_k": setting["top_k"],
        "moe.hidden_dim": 8,
        "moe.jitter": setting["jitter"],
        **tp_keys(setting["tp_splits"]),
        "data.corpus": "random",
        "training.seq_len": 7 if setting["tp_splits"] == "nothing" else 8,
        "training.microbatch_size": sequences(setting["tp_splits"], tp, 2),
        "training.dtype": "float64",
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
        "activation_checkpoint.mode": setting["recompute"],
        "checkpoint.enable": False,
    }
    for name, table in TABLES.items():
        changes |= table[setting[name]]
    if setting["by_layer"]:
        changes["model.num_layers"] = max(2, changes["model.num_layers"])
        changes["moe.top_k"] = [setting["top_k"], setting["top_k"] + 1]
        changes["moe.router"] = [changes["moe.router"], "topk"]
    config = with_microbatches(override(Config(), changes), layout, setting["accumulation"])
    return Case(layout, config, steps=2 if setting["balance"] in CARRIED else 1)


def settings(meshes: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Settings that hold every possible pair on one set of meshes."""
    return all_pairs(dimensions(meshes), functools.partial(possible, meshes))


@functools.cache
def routing_cases() -> list[Case]:
    """The whole list, ordered by mesh."""
    cases = [build_case(meshes, setting) for meshes in MESH_SETS for setting in settings(meshes)]
    order = [mesh for meshes in MESH_SETS for mesh in meshes]
    return sorted(cases, key=lambda case: order.index(case.layout.mesh))
