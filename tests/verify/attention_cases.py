"""The generated list of cases about attention: every pair of its keys, of placement, schedule and recomputation meets.

It is made twice, for two disjoint sets of meshes, so that every pair of attention's keys has met on two meshes.
"""

from __future__ import annotations

import functools
from typing import Any

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import SPLIT_BACKWARD
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.miniature import Case, Layout

from .mesh_cases import TP_SPLITS, Setting, all_pairs, sequences, tp_keys, with_microbatches

MESH_SETS: tuple[dict[str, tuple[int, int, int]], ...] = (
    {"1x1x2": (1, 1, 2), "2x1x1": (2, 1, 1), "1x2x2": (1, 2, 2)},
    {"1x1x4": (1, 1, 4), "2x1x2": (2, 1, 2)},
)
SCHEDULES = ("none", "1F1B", "Interleaved1F1B", "ZBVZeroBubble")
LATENT = {"model.kv_rank": 10, "model.nope_dim": 6, "model.rope_dim": 4, "model.v_dim": 5}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"model.num_heads": 4, "model.head_dim": 4},
    "few keys": {"model.num_heads": 8, "model.num_kv_heads": 2, "model.head_dim": 4},
    "latent": {"model.num_heads": 4, **LATENT},
    "latent, query rank": {"model.num_heads": 4, "model.q_rank": 14, **LATENT},
}
NEEDS_ORIGINAL = {"rope.original_length": 30, "rope.factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"rope.scaling": "linear", "rope.factor": 2.0},
    "llama3": {"rope.scaling": "llama3", **NEEDS_ORIGINAL},
    "yarn": {"rope.scaling": "yarn", **NEEDS_ORIGINAL},
    "yarn, not rounded": {
        "rope.scaling": "yarn",
        "rope.truncate": False,
        "rope.beta_fast": 3.0,
        "rope.attention_factor": 0.9,
        **NEEDS_ORIGINAL,
    },
    "longrope": {
        "rope.scaling": "longrope",
        "rope.short_factors": (9.0, 9.0),
        "rope.long_factors": (1.5, 3.0),
        "rope.factor": 3.0,
        "rope.original_length": 4,
    },
}
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"model.window": 3},
    "pattern": {"model.window": 3, "model.window_layers": ("window", "full"), "model.window_theta": 100.0},
    "full ones unrotated": {
        "model.window": 2,
        "model.window_layers": ("full", "window"),
        "model.rope_layers": ("none", "rope"),
        "rope.scale_windows": False,
    },
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "tp": {"mesh.experts": "tp"},
    "tp_hidden": {"mesh.experts": "tp_hidden"},
    "dp, all_to_all": {"mesh.experts": "dp", "mesh.dispatch": "all_to_all"},
    "dp_tp": {"mesh.experts": "dp_tp"},
}
TABLES = {"heads": HEADS, "scaling": SCALINGS, "window": WINDOWS, "placement": PLACEMENTS}
FLAGS: dict[str, dict[str, Any]] = {
    "sinks": {"model.sinks": True},
    "gate": {"model.attention_gate": True},
    "scale": {"model.attention_scale": 0.8},
    "part": {"model.head_dim": 6, "model.rotary_dim": 4},
    "clip": {"model.clip_qkv": 0.5},
    "documents": {"data.document_mask": True},
}


def dimensions(meshes: dict[str, tuple[int, int, int]]) -> dict[str, tuple[Any, ...]]:
    """What is paired, for one set of meshes."""
    return {
        "mesh": tuple(meshes),
        **{name: tuple(table) for name, table in TABLES.items()},
        "bias": ("none", "qkv", "all"),
        "qk_norm": ("none", "head", "full", "head_after_rope"),
        **dict.fromkeys(FLAGS, (False, True)),
        "schedule": SCHEDULES if any(pp > 1 for _, pp, _ in meshes.values()) else ("none",),
        "recompute": ("none", "full", "selective"),
        "tp_splits": TP_SPLITS,
    }


def possible(meshes: dict[str, tuple[int, int, int]], setting: Setting) -> bool:
    """Whether the values given so far can stand together in one case; dimensions may be absent."""
    s = setting
    if "mesh" in s and "schedule" in s and (meshes[s["mesh"]][1] == 1) != (s["schedule"] == "none"):
        return False
    if s.get("recompute") == "selective" and s.get("schedule") in SPLIT_BACKWARD:
        return False
    if not s.get("heads", "plain").startswith("latent"):
        return True
    return s.get("bias", "none") == s.get("qk_norm", "none") == "none" and not (s.get("part") or s.get("clip"))


def build_case(meshes: dict[str, tuple[int, int, int]], setting: Setting) -> Case:
    """The config of one setting, at miniature size."""
    dp, pp, tp = meshes[setting["mesh"]]
    layout = Layout(dp, pp, tp, setting["schedule"])
    changes = {
        "model.num_layers": max(2, pp * (1 if setting["schedule"] in ("none", "1F1B") else 2)),
        "model.dim": 16,
        "model.vocab_size": 61,
        "model.rope_theta": 50.0,
        "model.attention_bias": setting["bias"],
        "model.qk_norm": setting["qk_norm"],
        "moe.num_experts": 4,
        "moe.hidden_dim": 8,
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
    for name, keys in FLAGS.items():
        changes |= keys if setting[name] else {}
    return Case(layout, with_microbatches(override(Config(), changes), layout, 1))


def settings(meshes: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Settings that hold every possible pair on one set of meshes."""
    return all_pairs(dimensions(meshes), functools.partial(possible, meshes))


@functools.cache
def attention_cases() -> list[Case]:
    """The whole list, ordered by mesh."""
    cases = [build_case(meshes, setting) for meshes in MESH_SETS for setting in settings(meshes)]
    order = [mesh for meshes in MESH_SETS for mesh in meshes]
    return sorted(cases, key=lambda case: order.index(case.layout.mesh))
