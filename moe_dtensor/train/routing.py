"""What the run tells of its routers, and how far routing has moved since its start.

Drift: tokens of one fixed batch that go to other experts. B sequences, S positions, K choices, L MoE blocks, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.resolve import FORCED, moe_kinds, moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch, Loader
from moe_dtensor.layers.router import Router, Routing
from moe_dtensor.parallel.fsdp import reshard
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.metrics import Value
from moe_dtensor.train.step import StepResult, read_batch


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


class RoutingDrift:
    """Remembers where the run's first batch goes now, to compare with later.

    Routing is that of evaluation, so that neither noise nor Sinkhorn's neighbours count. Made before a checkpoint is
    loaded, so that a resumed run compares with the same start.

    Args:
        trainer: with the weights that the run starts from.
        loader: of training, at its start; it is there again afterwards.
    """

    def __init__(self, trainer: Trainer, loader: Loader) -> None:
        start = loader.state_dict()
        self.batch: Batch = read_batch(trainer, loader)
        loader.load_state_dict(start)
        self.layers = sorted(moe_layers(trainer.config))
        self.start = choices(trainer, self.batch)

    def measure(self, trainer: Trainer) -> Tensor:
        """Share of the batch's tokens whose set of experts is another than at the start, ``(L,)`` float64; not a
        number for blocks that evaluation leaves out. The same on every rank; called by all together."""
        counts_2L = torch.zeros(2, len(self.layers), dtype=torch.float64, device=trainer.device)
        for layer, expert_BSK in choices(trainer, self.batch).items():
            row = self.layers.index(layer)
            counts_2L[0, row] = (expert_BSK != self.start[layer]).any(-1).sum()
            counts_2L[1, row] = expert_BSK[..., 0].numel()
        # Each token once for each rank that scored it: without sequence parallelism all of tp did.
        dist.all_reduce(counts_2L)
        return counts_2L[0] / counts_2L[1]


@torch.no_grad()
def choices(trainer: Trainer, batch: Batch) -> dict[int, Tensor]:
    """Experts of the tokens that this rank holds, by the index of each of its MoE blocks: ``(B, S, K)`` int32, sorted
    over K."""
    chosen: dict[int, list[Tensor]] = {}
    handles, forwards = [], []
    for part in trainer.parts:
        for name, module in part.named_modules():
            if isinstance(module, Router):
                kept = chosen.setdefault(int(name.split(".")[1]), [])
                handles.append(module.register_forward_hook(_keep_in(kept)))
        # Compiled code knows nothing of hooks that come and go; what compiles or recomputes a block is on its instance.
        forwards += [(block, block.__dict__.pop("forward", None)) for block in part.layers.values()]
        part.eval()
    try:
        trainer.runner.evaluate(batch)
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in forwards:
            if forward is not None:
                block.forward = forward
        for part in trainer.parts:
            reshard(part)
            part.train()
    return {layer: torch.cat(kept) for layer, kept in chosen.items() if kept}


def _keep_in(kept: list[Tensor]) -> Any:
    def keep(module: Router, arguments: Any, routing: Routing) -> None:
        kept.append(routing.expert_BSK.sort(-1).values.to(torch.int32))

    return keep
