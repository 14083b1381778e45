"""The generated list of cases about the model and the mesh: every pair of settings meets on some mesh, without every
product being run; and how such a list is made, for the other two."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import SPLIT_BACKWARD, microbatches
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.miniature import Case, Layout, legal

MESHES = {
    "2x1x1": (2, 1, 1),
    "1x1x2": (1, 1, 2),
    "1x1x4": (1, 1, 4),
    "1x1x8": (1, 1, 8),
    "2x1x2": (2, 1, 2),
    "1x2x2": (1, 2, 2),
    "2x2x2": (2, 2, 2),
    "1x3x2": (1, 3, 2),
}
BY_SEQUENCE = "sequences, of attention too"
TP_SPLITS = ("sequences", BY_SEQUENCE, "positions", "nothing")
"""What tp splits between layers: whole sequences of a microbatch (and inside attention in place of heads), the
positions of each, or neither."""
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "mesh": tuple(MESHES),
    "schedule": (
        "none",
        "GPipe",
        "1F1B",
        "Interleaved1F1B",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
    ),
    # 1: the fewest microbatches that the schedule runs with, one without a pipeline. 3: at least that, and two more.
    "accumulation": (1, 3),
    "recompute": ("none", "full", "selective"),
    "tied": (False, True),
    "top_k": (1, 2),
    "router": ("sinkhorn", "sinkhorn in groups", "topk"),
    "dense_first": (False, True),
    "shared": ("none", "plain", "wide, with a gate"),
    "norm_at": ("pre", "post", "both"),
    "scales": (False, True),
    "parallel_block": (False, True),
    "ffn_bias": (False, True),
    "head_bias": (False, True),
    "router_bias": (False, True),
    "gate_on": ("output", "input"),
    "empty_expert": (False, True),
    "kv_heads": ("all", "fewer than tp"),
    "qk_norm": ("none", "head", "full"),
    "tp_splits": TP_SPLITS,
    "activation": ("swiglu", "gelu", "swiglu_clamped"),
    "expert_bias": (False, True),
    "norm": ("rmsnorm", "layernorm", "layernorm, with a bias"),
    "documents": (False, True),
    "mtp_depth": (0, 1, 2),
}
SCALES = {"model.embedding_scale": 3.0, "model.residual_scale": 0.7, "model.logit_scale": 1.5}
Setting = Mapping[str, Any]


def sequences(tp_splits: str, tp: int, least: int) -> int:
    """Of a microbatch: so many at least, and a multiple of tp if whole ones are to be split, none if positions are."""
    if tp_splits.startswith("sequences"):
        return math.lcm(least, tp)
    return least + 1 if tp_splits == "positions" and tp > 1 and least % tp == 0 else least


def tp_keys(tp_splits: str) -> dict[str, Any]:
    """The keys of [mesh] that say so."""
    attention = "sequences" if tp_splits == BY_SEQUENCE else "heads"
    return {"mesh.sequence_parallel": tp_splits != "nothing", "mesh.attention": attention}


def possible(setting: Setting) -> bool:
    """Whether the values given so far can stand together in one case; dimensions may be absent."""
    s = setting
    if "mesh" in s and "schedule" in s and (MESHES[s["mesh"]][1] == 1) != (s["schedule"] == "none"):
        return False
    pipelined = s.get("schedule", "none") != "none" or MESHES[s.get("mesh", "1x1x2")][1] > 1
    if s.get("tied") and (pipelined or s.get("head_bias")):
        return False
    if s.get("recompute") == "selective" and s.get("schedule") in SPLIT_BACKWARD:
        return False
    # Fewer than one head is not to be had.
    if s.get("kv_heads") == "fewer than tp" and MESHES[s.get("mesh", "1x1x2")][2] == 1:
        return False
    if s.get("gate_on") == "input" and s.get("top_k", 1) > 1:
        return False
    # Sinkhorn leaves no expert empty; with two choices the average expert is sometimes second.
    return not (s.get("empty_expert") and (s.get("router", "topk") != "topk" or s.get("top_k", 1) != 1))


def all_pairs(dimensions: Mapping[str, tuple[Any, ...]], allowed: Callable[[Setting], bool]) -> list[dict[str, Any]]:
    """Settings that between them hold every allowed pair of values; greedy and the same every time.

    Each new setting starts from a pair not yet covered and takes, dimension by dimension, the value that
    covers most. ``allowed`` must be decidable on partial settings, and every partial setting that it
    allows must have an allowed completion.
    """
    order = random.Random(0)
    names = list(dimensions)
    missing = {
        (a, va, b, vb): None
        for a, b in itertools.combinations(names, 2)
        for va in dimensions[a]
        for vb in dimensions[b]
        if allowed({a: va, b: vb})
    }
    settings = []
    while missing:
        best = max((_grow(dimensions, allowed, missing, order) for _ in range(20)), key=lambda s: _covers(s, missing))
        for pair in list(missing):
            if _holds(best, pair):
                del missing[pair]
        settings.append(best)
    return settings


def _grow(dimensions: Mapping, allowed: Callable, missing: Mapping, order: random.Random) -> dict[str, Any]:
    a, va, b, vb = next(iter(missing))
    setting = {a: va, b: vb}
    rest = [name for name in dimensions if name not in setting]
    order.shuffle(rest)
    for name in rest:
        options = [v for v in dimensions[name] if allowed(setting | {name: v})]
        order.shuffle(options)
        setting[name] = max(options, key=lambda v: _covers(setting | {name: v}, missing))
    return {name: setting[name] for name in dimensions}


def _holds(setting: Setting, pair: tuple[str, Any, str, Any]) -> bool:
    a, va, b, vb = pair
    return setting.get(a, ...) == va and setting.get(b, ...) == vb


def _covers(setting: Setting, missing: Mapping) -> int:
    return sum(_holds(setting, pair) for pair in missing)


def build_case(setting: Setting) -> Case:
    """The config of one setting, at miniature size."""
    dp, pp, tp = MESHES[setting["mesh"]]
    layout = Layout(dp, pp, tp, setting["schedule"])
    grouped = setting["router"] == "sinkhorn in groups"
    config = override(
        Config(),
        {
            "model.num_layers": max(2, pp * (1 if setting["schedule"] in ("none", "GPipe", "1F1B") else 2)),
            "model.dim": 24,
            "model.num_heads": 8,
            "model.num_kv_heads": 8 if setting["kv_heads"] == "all" else max(1, tp // 2),
            "model.head_dim": 4,
            "model.hidden_dim": 40,
            "model.vocab_size": 101,
            "model.activation": setting["activation"],
            "model.norm": setting["norm"].partition(",")[0],
            "model.norm_bias": setting["norm"].endswith("bias"),
            "model.ffn_bias": setting["ffn_bias"],
            "model.head_bias": setting["head_bias"],
            "model.parallel_block": setting["parallel_block"],
            "model.qk_norm": setting["qk_norm"],
            "model.tie_embeddings": setting["tied"],
            "moe.num_experts": 8,
            "moe.top_k": setting["top_k"],
            "moe.hidden_dim": 16,
            "moe.router": "topk" if setting["router"] == "topk" else "sinkhorn",
            "moe.group_sequences": 1 if grouped else 0,
            "moe.num_shared_experts": int(setting["shared"] == "plain"),
            "moe.shared_hidden_dim": 24 if setting["shared"] == "wide, with a gate" else 0,
            "moe.shared_gate": setting["shared"] == "wide, with a gate",
            "moe.router_bias": setting["router_bias"],
            "moe.expert_bias": setting["expert_bias"],
            "moe.gate_on": setting["gate_on"],
            "model.norm_at": setting["norm_at"],
            "model.mtp_depth": setting["mtp_depth"],
            **(SCALES if setting["scales"] else {}),
            **tp_keys(setting["tp_splits"]),
            "data.corpus": "random",
            "data.document_mask": setting["documents"],
            "training.seq_len": 7 if setting["tp_splits"] == "nothing" else 8,
            "training.microbatch_size": sequences(setting["tp_splits"], tp, 2 if grouped else 1),
            "training.dtype": "float64",
            "training.param_dtype": "float64",
            "training.reduce_dtype": "float64",
            "training.max_grad_norm": 0.5,
            "activation_checkpoint.mode": setting["recompute"],
            "checkpoint.enable": False,
        },
    )
    if setting["dense_first"]:
        config = override(config, {"moe.layers": tuple(range(1, config.model.num_layers))})
    config = with_microbatches(config, layout, setting["accumulation"])
    return Case(layout, config, setting["empty_expert"])


def with_microbatches(config: Config, layout: Layout, accumulation: int) -> Config:
    """With the fewest microbatches that the layout takes, or with ``accumulation - 1`` more at least."""
    each = layout.dp * config.training.microbatch_size
    counts = iter(range(1, 100))

    def next_legal() -> Config:
        tried = (override(config, {"training.global_batch_size": n * each}) for n in counts)
        return next(c for c in tried if legal(c, [layout]))

    fewest = next_legal()
    if accumulation == 1:
        return fewest
    least = microbatches(layout.place(fewest)) + accumulation - 1
    while microbatches(layout.place(more := next_legal())) < least:
        pass
    return more


def generated_cases() -> list[Case]:
    """The whole list, at most 60, ordered by mesh so that one start of the ranks serves each."""
    cases = [build_case(setting) for setting in all_pairs(DIMENSIONS, possible)]
    return sorted(cases, key=lambda case: list(MESHES).index(case.layout.mesh))
