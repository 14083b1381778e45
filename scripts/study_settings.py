"""What the study of docs/study.md compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

CONFIG = "train_configs/debug.toml"
SMALL = {
    "model.num_layers": "3",
    "training.global_batch_size": "12",
    "training.validation_interval": "20",
    "training.validation_sequences": "48",
    "checkpoint.interval": "50",
    "mesh.dp": "1",
}
"""What the runs change of the debug config: half the blocks, smaller steps, validation."""
EVERY = 5
"""Steps that one point of a kept curve is the mean of."""
HELD_OUT_SEQUENCES = 240
"""Sequences of the measurement after training."""
PLACEMENTS = (
    ("tp", "all_gather"),
    ("tp", "all_to_all"),
    ("tp_hidden", "all_gather"),
    ("dp", "all_gather"),
    ("dp", "all_to_all"),
    ("dp_tp", "all_gather"),
    ("dp_tp", "all_to_all"),
)
"""``mesh.experts`` and ``mesh.dispatch``."""
MEASURED = "held_out.json"
"""What the measurement leaves in a run's folder; with it a run is finished."""


@dataclass(frozen=True)
class Setting:
    """One way to route."""

    key: str
    family: str
    short: str
    """Its name within the family's panel."""
    label: str
    """Its name anywhere else."""
    changes: dict[str, str] = field(default_factory=dict)
    """Of the config, by key."""


def _topk(key: str, family: str, short: str, label: str, **moe: str) -> Setting:
    return Setting(key, family, short, label, {"moe.router": "topk"} | {f"moe.{name}": v for name, v in moe.items()})


FAMILIES = {
    "loss": "auxiliary loss",
    "bias": "bias on the choice",
    "group": "balanced assignment",
    "forced": "no choice",
    "capacity": "capacity",
}
SETTINGS = (
    _topk("topk", "none", "top-k", "top-k, nothing else"),
    Setting("dense", "none", "dense", "dense, K experts wide", {"moe.num_experts": "0", "model.hidden_dim": "256"}),
    _topk("balance_sequence", "loss", "sequence", "loss, sequence", balance_loss="0.01", balance_over="sequence"),
    _topk("balance_group", "loss", "group", "loss, group", balance_loss="0.01", balance_over="group"),
    _topk("balance_batch", "loss", "batch", "loss, batch", balance_loss="0.01", balance_over="batch"),
    _topk("balance_z", "loss", "group + z", "loss, group + z-loss", balance_loss="0.01", z_loss="0.001"),
    _topk("bias_slow", "bias", "rate 0.001", "bias, rate 0.001", bias_rate="0.001"),
    _topk("bias", "bias", "rate 0.01", "bias, rate 0.01", bias_rate="0.01"),
    _topk(
        "sigmoid_bias",
        "bias",
        "sigmoid, 0.01",
        "sigmoid, bias, rate 0.01",
        score="sigmoid",
        normalize_gates="true",
        bias_rate="0.01",
    ),
    Setting("sinkhorn", "group", "Sinkhorn", "Sinkhorn", {"moe.router": "sinkhorn"}),
    Setting("expert_choice", "group", "expert choice", "expert choice", {"moe.router": "expert_choice"}),
    Setting("hash", "forced", "hash", "hash of the byte", {"moe.router": "hash"}),
    Setting("uniform", "forced", "by chance", "by chance", {"moe.router": "uniform"}),
    _topk("capacity", "capacity", "1.25", "capacity 1.25", capacity_factor="1.25"),
    _topk(
        "capacity_balance",
        "capacity",
        "1.25 + loss",
        "capacity 1.25 + loss, group",
        capacity_factor="1.25",
        balance_loss="0.01",
    ),
)

OVER_BLOCKS: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "load_max_over_mean": ("expert_load_max_over_mean", fmean),
    "load_worst_block": ("expert_load_max_over_mean", max),
    "load_cv": ("expert_load_cv", fmean),
    "experts_without_tokens": ("experts_without_tokens", sum),
    "load_churn": ("expert_load_churn", fmean),
    "router_entropy": ("router_entropy", fmean),
    "differs_from_top_k": ("differs_from_top_k", fmean),
    "dropped": ("dropped", fmean),
}
"""Curves of the routers: the metric by block, and how blocks become one number."""
