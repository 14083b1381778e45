"""What the run tells of its routers. L MoE blocks, E experts."""

from __future__ import annotations

from torch import Tensor

from moe_dtensor.config.resolve import FORCED, moe_kinds
from moe_dtensor.config.schema import Config
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.step import StepResult


def routing_notice(config: Config) -> str:
    """What has to be known of a router before its numbers are believed; empty if nothing."""
    routers = _routers(config)
    if "expert_choice" in routers:
        return (
            "moe.router = expert_choice: experts choose among the tokens of a whole routing group, later ones too, so "
            "the training loss may profit from what a generating model cannot know. Validation takes plain top-k."
        )
    forced = [router for router in routers if router in FORCED]
    if forced:
        return f"moe.router = {forced[0]} is forced: it looks at no token's vector, in validation neither."
    return ""


def _routers(config: Config) -> list[str]:
    """Of the MoE blocks, each once."""
    return list(dict.fromkeys(kind.moe.router for kind in moe_kinds(config)))


def routing_metrics(config: Config, result: StepResult) -> dict[str, Value]:
    """Diagnostics of the MoE blocks by name, ``(L,)`` each; those of what is switched off are left out. A forced
    router is named in every record."""
    load_LE, means = result.routing
    routers = _routers(config)
    forced = [router for router in routers if router in FORCED]
    off = {
        "balance_loss": config.moe.balance_loss == 0,
        "dropped": config.moe.capacity_factor == 0,
        "differs_from_top_k": set(routers) <= {"topk", *FORCED},
        "sinkhorn_error": "sinkhorn" not in routers,
    }
    label: dict[str, Value] = {"forced_router": ", ".join(forced)} if forced else {}
    return label | {
        **load_metrics("", load_LE),
        "expert_load_churn": result.churn_L,
        **{name: mean_L for name, mean_L in means.items() if not off.get(name)},
    }


def load_metrics(prefix: str, load_LE: Tensor) -> dict[str, Value]:
    """How evenly tokens were sent to the experts of each MoE block, ``(L,)`` each; nothing without experts."""
    if not len(load_LE):
        return {}
    return {
        f"{prefix}expert_load_max_over_mean": load_LE.amax(1) / load_LE.mean(1),
        f"{prefix}expert_load_cv": load_LE.std(1, correction=0) / load_LE.mean(1),
        f"{prefix}experts_without_tokens": (load_LE == 0).sum(1),
    }
