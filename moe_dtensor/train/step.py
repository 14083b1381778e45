"""One training step. B sequences, S positions, L layers, E experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.data.loader import IGNORED, Batch, Loader
from moe_dtensor.layers.router import STATISTICS, RoutingRecord, unpack_record
from moe_dtensor.parallel import collectives, gradients
from moe_dtensor.parallel.fsdp import reshard
from moe_dtensor.train.build import Trainer


@dataclass(frozen=True)
class StepResult:
    """What a step measured over all ranks, the same on each; tensors on the device that the host has not waited for."""

    loss: Tensor
    """Mean cross-entropy of the step's target tokens, in nats; float64 scalar."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    finite: Tensor
    """Whether loss and gradients were finite, so that the update was applied."""
    routing: RoutingRecord
    """What the routers of all MoE blocks tell."""
    churn_L: Tensor
    """How much the load moved since the step before: see :meth:`BalanceState.step`."""
    mtp_loss_K: Tensor
    """Of each depth of multi-token prediction the summed loss over the step's target tokens, in nats."""
    asked_to_end: Tensor
    """Above 0 if some rank was asked to end."""
    source_loss_N: Tensor | None = None
    """Mean loss over the target tokens of each of ``data.sources``; not a number where the step has none of it."""
    token_shares: dict[str, Tensor] = field(default_factory=dict)
    """Of the step's tokens: ``trained_share``, those that are targets, ``padding_share``. Only with conversations."""


def read_batch(trainer: Trainer, loader: Loader) -> Batch:
    """This dp rank's sequences of the next global batch, on its device."""
    share = loader.batch_size // trainer.config.mesh.dp
    dp_rank = trainer.mesh["dp"].get_local_rank()
    return to_device(loader.next_batch(dp_rank * share, (dp_rank + 1) * share), trainer.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device; from pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return batch

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True)

    return Batch(
        move(batch.tokens_BS),
        move(batch.labels_BS),
        None if batch.positions_BS is None else move(batch.positions_BS),
        None if batch.documents_BS is None else move(batch.documents_BS),
        None if batch.sequence_B is None else move(batch.sequence_B),
        None if batch.source_B is None else move(batch.source_B),
        None if batch.padding_B is None else move(batch.padding_B),
    )


def train_step(trainer: Trainer, batch: Batch, asked_to_end: float = 0.0) -> StepResult:
    """Forward, backward, clip and update over one global batch, of which ``batch`` is this dp rank's share.

    Args:
        asked_to_end: above 0 where this rank was asked to end; every rank finds the sum in the result.
    """
    training = trainer.config.training
    trainer.optimizers.zero_grad()
    targets, shares = count_tokens(trainer, batch)
    scale = 1.0 / targets
    keep_sequence_losses(trainer, batch)
    loss = trainer.runner.step(batch, scale)
    trainer.optimizers.drop_frozen()
    loss, record_LR, mtp_K, source_2N, asked = sum_over_ranks(
        trainer,
        loss,
        take_record(trainer),
        take_mtp_loss(trainer) * scale,
        take_source_losses(trainer, batch),
        asked_to_end,
    )
    norm = gradients.global_norm(trainer.parts, training.norm_type, trainer.device)
    finite = norm.isfinite() & loss.isfinite()
    gradients.clip(trainer.parts, norm, training.max_grad_norm)
    update(trainer, finite)
    routing = unpack_record(record_LR, training.global_batch_size * training.seq_len, trainer.top_k)
    churn_L = trainer.balance.step(routing.load_LE, finite)
    source_loss_N = source_2N[0] / source_2N[1] if batch.source_B is not None else None
    return StepResult(loss, norm, finite, routing, churn_L, mtp_K, asked, source_loss_N, shares)


class Evaluated(NamedTuple):
    """What batches gave in evaluation, over all ranks."""

    loss: Tensor
    """Summed over all targets, in nats; float64 scalar."""
    targets: Tensor
    load_LE: Tensor
    """Copies sent to each expert of each MoE block."""

    @property
    def mean(self) -> Tensor:
        """Loss of a target."""
        return self.loss / self.targets


def evaluate(trainer: Trainer, batches: Iterable[Batch]) -> Tensor:
    """Mean loss of the target tokens of all ``batches``, see :func:`evaluate_batches`; float64."""
    return evaluate_batches(trainer, batches).mean


@torch.no_grad()
def evaluate_batches(trainer: Trainer, batches: Iterable[Batch]) -> Evaluated:
    """Forward only, under every schedule, routed as in evaluation.

    Args:
        batches: of each global batch this dp rank's share.
    """
    for part in trainer.parts:
        part.eval()
        part.records_evaluation = True
    loss = torch.zeros((), dtype=torch.float64, device=trainer.device)
    targets = torch.zeros_like(loss)
    for batch in batches:
        loss += trainer.runner.evaluate(batch)
        targets += count_targets(trainer, batch)
    for part in trainer.parts:
        reshard(part)
        part.train()
        part.records_evaluation = False
    none_2N = torch.zeros(2, 0, dtype=torch.float64, device=trainer.device)
    total, record_LR, *_ = sum_over_ranks(trainer, loss, take_record(trainer), take_mtp_loss(trainer), none_2N)
    return Evaluated(total, targets, record_LR[:, : trainer.config.moe.num_experts])


def count_targets(trainer: Trainer, batch: Batch) -> Tensor:
    """Target tokens of the global batch, as a scalar of the loss's dtype (at least float32)."""
    return count_tokens(trainer, batch)[0]


def count_tokens(trainer: Trainer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Targets, see :func:`count_targets`; and of conversations the ``token_shares`` of :class:`StepResult`. One
    collective."""
    counts = [(batch.labels_BS != IGNORED).sum()]
    if batch.padding_B is not None:
        counts.append(batch.padding_B.sum())
    targets, *padding = collectives.all_reduce(torch.stack(counts), trainer.mesh["dp"]).unbind()
    training = trainer.config.training
    dtype = torch.promote_types(getattr(torch, training.param_dtype), torch.float32)
    tokens = training.global_batch_size * training.seq_len
    shares = {"trained_share": targets / tokens, "padding_share": padding[0] / tokens} if padding else {}
    return targets.clamp(min=1).to(dtype), shares


def take_record(trainer: Trainer) -> Tensor:
    """The routing of this rank's tokens at its place in the whole model, ``(MoE blocks, R)`` float64."""
    layers = sorted(moe_layers(trainer.config))
    width = trainer.config.moe.num_experts + len(STATISTICS)
    record_LR = torch.zeros(len(layers), width, dtype=torch.float64, device=trainer.device)
    for part in trainer.parts:
        counted = part.take_record()
        if counted is not None:
            first = layers.index(part.moe_layers[0])
            record_LR[first : first + len(counted)] = counted
    return record_LR


def take_mtp_loss(trainer: Trainer) -> Tensor:
    """The losses of multi-token prediction on this rank ``(K,)``; 0 where it has no last stage."""
    taken = [loss_K for part in trainer.parts if (loss_K := part.take_mtp_loss()) is not None]
    return taken[0] if taken else torch.zeros(trainer.config.model.mtp_depth, device=trainer.device)


def keep_sequence_losses(trainer: Trainer, batch: Batch) -> None:
    """Have the last stage keep the loss of each sequence, where sources are to be told apart."""
    for part in trainer.parts:
        part.sequence_losses = [] if batch.source_B is not None and part.is_last else None


def take_source_losses(trainer: Trainer, batch: Batch) -> Tensor:
    """Summed loss and target tokens of each source on this rank, ``(2, N)`` float64; 0 without the last stage."""
    source_2N = torch.zeros(2, len(trainer.config.data.sources), dtype=torch.float64, device=trainer.device)
    for part in trainer.parts:
        kept, part.sequence_losses = part.sequence_losses, None
        if not kept or batch.source_B is None or batch.sequence_B is None:
            continue
        sequence_B, loss_B = (torch.cat(x) for x in zip(*kept, strict=True))
        place_B = sequence_B - batch.sequence_B[0]  # microbatches may come in any order
        source_2N[0].index_add_(0, batch.source_B[place_B], loss_B.to(torch.float64))
        targets_B = (batch.labels_BS != IGNORED).sum(1)
        source_2N[1].index_add_(0, batch.source_B, targets_B.to(torch.float64))
    return source_2N


def sum_over_ranks(
    trainer: Trainer,
    loss: Tensor,
    record_LR: Tensor,
    mtp_K: Tensor,
    source_2N: Tensor,
    asked_to_end: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each rank's share of losses and routing record to those of the step, and requests to end, in one collective."""
    if trainer.mesh["tp"].get_local_rank() > 0:
        # tp ranks hold the same loss; without sequence parallelism they also count the same tokens.
        loss, mtp_K, source_2N = torch.zeros_like(loss), torch.zeros_like(mtp_K), torch.zeros_like(source_2N)
        record_LR = record_LR if trainer.config.mesh.sequence_parallel else torch.zeros_like(record_LR)
    asked = torch.full((1,), asked_to_end, dtype=torch.float64, device=loss.device)
    shares = [loss.to(torch.float64).reshape(1), mtp_K.to(torch.float64), record_LR.flatten(), source_2N.flatten()]
    packed = torch.cat([*shares, asked])
    dist.all_reduce(packed)
    loss, mtp_K, record, source, asked = packed.split([*(len(share) for share in shares), 1])
    return loss[0], record.view_as(record_LR), mtp_K, source.view_as(source_2N), asked[0]


def update(trainer: Trainer, finite: Tensor) -> None:
    """Apply the optimizer step unless the gradients are not finite. On a GPU the optimizer decides there, unasked."""
    if trainer.device.type == "cpu" or trainer.config.fsdp.cpu_offload:
        if finite:
            trainer.optimizers.step()
    else:
        for optimizer in trainer.optimizers:
            optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
    trainer.schedule.step()
