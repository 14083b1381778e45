"""One training step. B sequences, S positions, L layers, E experts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.data.loader import IGNORED, Batch, Loader
from moe_dtensor.parallel import collectives, gradients
from moe_dtensor.train.build import Trainer


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as tensors on the device: nothing here has made the host wait."""

    loss: Tensor
    """Mean cross-entropy of the step's target tokens, in nats. Summed over this rank only: see :func:`totals`."""
    grad_norm: Tensor
    """Global gradient norm before clipping, the same on every rank."""
    finite: Tensor
    """Whether the gradients were finite, so that the update was applied; the same on every rank."""
    load_LE: Tensor
    """Copies sent to each expert of every layer (0 for dense ones), float64, of this rank's tokens."""


def read_batch(trainer: Trainer, loader: Loader) -> Batch:
    """This dp rank's sequences of the next global batch, on its device."""
    share = loader.batch_size // trainer.config.mesh.dp
    dp_rank = trainer.mesh["dp"].get_local_rank()
    return to_device(loader.next_batch(dp_rank * share, (dp_rank + 1) * share), trainer.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device; from pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return batch
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch,
        **{k: x if x is None else x.pin_memory().to(device, non_blocking=True) for k, x in moved.items()},
    )


def train_step(trainer: Trainer, batch: Batch) -> StepResult:
    """Forward, backward, clip and update over one global batch, of which ``batch`` is this dp rank's share."""
    config, parts = trainer.config, trainer.parts
    trainer.optimizers.zero_grad()
    targets = collectives.all_reduce((batch.labels_BS != IGNORED).sum(), trainer.mesh["dp"])
    scale = 1.0 / targets.clamp(min=1).to(torch.float64 if trainer.device.type == "cpu" else torch.float32)
    loss = trainer.runner.step(batch, scale.to(loss_dtype(trainer)))
    norm = gradients.global_norm(parts, trainer.mesh, config.training.norm_type, trainer.device)  # type: ignore[arg-type]
    finite = norm.isfinite()
    gradients.clip(parts, norm, config.training.max_grad_norm)  # type: ignore[arg-type]
    update(trainer, finite)
    return StepResult(loss=loss, grad_norm=norm, finite=finite, load_LE=take_load(trainer))


def loss_dtype(trainer: Trainer) -> torch.dtype:
    """dtype of the loss: at least float32."""
    return torch.promote_types(getattr(torch, trainer.config.training.param_dtype), torch.float32)


def update(trainer: Trainer, finite: Tensor) -> None:
    """Apply the optimizer step unless the gradients are not finite. On a GPU the optimizer decides there, unasked."""
    if trainer.device.type == "cpu" or trainer.config.fsdp.cpu_offload:
        if finite:
            trainer.optimizers.step()
    else:
        for optimizer in trainer.optimizers:
            setattr(optimizer, "found_inf", (~finite).to(torch.float32))
            optimizer.step()
    trainer.schedule.step()


def take_load(trainer: Trainer) -> Tensor:
    """The load of this rank's tokens at their place in the whole model, ``(num_layers, E)``."""
    config = trainer.config
    load_LE = torch.zeros(
        config.model.num_layers, max(1, config.moe.num_experts), dtype=torch.float64, device=trainer.device
    )
    for part in trainer.parts:
        counted = part.take_load()
        if counted is not None:
            load_LE[part.moe_layers] = counted.to(torch.float64)
    return load_LE


def totals(trainer: Trainer, result: StepResult) -> tuple[float, float, bool, list[list[float]]]:
    """Loss, gradient norm, finiteness and load ``(num_layers, E)`` over all ranks. The one host sync of a logged step."""
    tp, sp = trainer.mesh["tp"], trainer.config.mesh.sequence_parallel
    loss, load_LE = result.loss.to(torch.float64), result.load_LE
    if tp.get_local_rank() > 0:
        # tp ranks hold the same loss; without sequence parallelism they count the same tokens.
        loss = torch.zeros_like(loss)
        load_LE = load_LE if sp else torch.zeros_like(load_LE)
    packed = torch.cat([loss.reshape(1), load_LE.flatten()])
    dist.all_reduce(packed)
    flags = torch.stack([result.grad_norm.to(torch.float64), result.finite.to(torch.float64)])
    total, norm, finite, *counts = torch.cat([packed[:1], flags, packed[1:]]).tolist()
    width = load_LE.shape[1]
    load = [counts[i : i + width] for i in range(0, len(counts), width)]
    return total, norm, bool(finite), load if moe_layers(trainer.config) else []
