"""Forward and backward over all microbatches of a step: through pipeline stages, or one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import SPLIT_BACKWARD, microbatches, num_stages, rank_stages
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.estimate.memory import settle_accumulate
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.expert_copies import WithOwnExperts, has_own_experts
from moe_dtensor.parallel.forward_pass import ForwardPass, stream_shape
from moe_dtensor.parallel.fsdp import next_microbatch
from moe_dtensor.parallel.runner import Runner

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

FIRST_TORCH_TO_SPLIT = (2, 13)
"""torch 2.11 loses autograd nodes of the experts between the two halves of a backward pass, and its V schedules hang on
gloo; 2.12 was not tried."""


def build_runner(parts: list[Transformer], config: Config, mesh: DeviceMesh, device: torch.device) -> Runner:
    """Accumulation for pp = 1, else the pipeline schedule."""
    runner: Runner
    if config.mesh.pp == 1:
        runner = Accumulation(parts[0], config)
    else:
        check_torch(config, torch.__version__)
        runner = Pipeline(parts, config, mesh, device)
    if has_own_experts(config):
        runner = WithOwnExperts(parts, runner, getattr(torch, config.training.reduce_dtype))
    return runner


def check_torch(config: Config, version: str) -> None:
    """Raise ConfigError if this torch cannot run the configured schedule rightly."""
    wanted = ".".join(map(str, FIRST_TORCH_TO_SPLIT))
    installed = tuple(int(part) for part in version.split(".")[:2])
    if config.mesh.pp > 1 and config.pipeline.schedule in SPLIT_BACKWARD and installed < FIRST_TORCH_TO_SPLIT:
        raise ConfigError(
            f"pipeline.schedule = {config.pipeline.schedule} splits the backward pass, which needs torch {wanted} or "
            f"newer; this is torch {version}.",
            f"Install torch {wanted}, or set pipeline.schedule to 1F1B, GPipe or Interleaved1F1B.",
        )


def split(batch: Batch, size: int) -> list[tuple[Tensor | None, ...]]:
    """Cut a batch into microbatches of ``size`` sequences: the arguments of the model for each."""
    fields = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS, None, batch.sequence_B)
    count = batch.tokens_BS.shape[0] // size
    return list(zip(*([None] * count if x is None else x.split(size) for x in fields), strict=True))


class Accumulation:
    """pp = 1: one microbatch after the other, gradients reduced with the last, or with each (``fsdp.accumulate``)."""

    def __init__(self, part: Transformer, config: Config) -> None:
        self.part = part
        self.config = settle_accumulate(config)

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward; the summed loss times ``scale``, a scalar."""
        chunks = split(batch, self.config.training.microbatch_size)
        losses = []
        for i, arguments in enumerate(chunks):
            next_microbatch(self.part, self.config, last=i == len(chunks) - 1)
            loss = self.part(*arguments).sum() * scale
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only; the summed loss."""
        chunks = split(batch, self.config.training.microbatch_size)
        return torch.stack([self.part(*arguments).sum() for arguments in chunks]).sum()


class Pipeline:
    """pp > 1: a schedule of torch.distributed.pipelining over this rank's stages."""

    def __init__(self, parts: list[Transformer], config: Config, mesh: DeviceMesh, device: torch.device) -> None:
        # Here, since it loads the compiler, which a rank without a pipeline may not need yet.
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        stages = rank_stages(config, mesh["pp"].get_local_rank())
        self.has_first = 0 in stages
        self.has_last = num_stages(config) - 1 in stages
        self.scale: Tensor | None = None
        self.stages = [
            _build_stage(part, index, config, mesh, device) for part, index in zip(parts, stages, strict=True)
        ]
        schedule_class = get_schedule_class(config.pipeline.schedule)
        self.schedule = schedule_class(
            self.stages[0] if issubclass(schedule_class, PipelineScheduleSingle) else self.stages,
            n_microbatches=microbatches(config),
            loss_fn=self._scaled,
            scale_grads=False,
        )
        self.forward_pass = ForwardPass(parts, config, mesh, device)
        self.microbatch_size = config.training.microbatch_size
        self.device = device

    def _scaled(self, loss_B: Tensor, _labels: Tensor) -> Tensor:
        assert self.scale is not None
        return loss_B.sum() * self.scale

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward; the summed loss times ``scale``, on ranks without the last stage 0."""
        self.scale = scale
        names = ("labels_BS", "positions_BS", "documents_BS", "tokens_BS", "sequence_B")
        kwargs = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        losses: list[Tensor] = []
        self.schedule.step(
            *((batch.tokens_BS,) if self.has_first else ()),
            target=batch.labels_BS if self.has_last else None,
            losses=losses if self.has_last else None,
            **kwargs,
        )
        return torch.stack([x.detach() for x in losses]).sum() if losses else torch.zeros((), device=self.device)

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only; the summed loss, on ranks without the last stage 0."""
        return self.forward_pass(split(batch, self.microbatch_size))


def _build_stage(
    part: Transformer, index: int, config: Config, mesh: DeviceMesh, device: torch.device
) -> PipelineStage:
    """A stage whose shapes are given, so that nothing is run to infer them."""
    from torch.distributed.pipelining import PipelineStage

    if settle_accumulate(config).fsdp.accumulate == "sharded":
        if not hasattr(PipelineStage, "perform_reduce_grad"):  # what ends a step's reductions
            raise ConfigError(
                f"fsdp.accumulate = sharded under a pipeline needs a newer torch than {torch.__version__}.",
                "Set fsdp.accumulate = whole, or mesh.pp = 1.",
            )
        from moe_dtensor.parallel.reducing_stage import ReducingStage as PipelineStage

    training = config.training
    dtype = getattr(torch, training.param_dtype)
    stream = torch.empty(stream_shape(config), device="meta", dtype=dtype, requires_grad=True)
    tokens = torch.empty(training.microbatch_size, training.seq_len, device="meta", dtype=torch.int64)
    loss_dtype = torch.promote_types(dtype, torch.float32)
    loss = torch.empty(training.microbatch_size, device="meta", dtype=loss_dtype, requires_grad=True)
    return PipelineStage(
        part,
        index,
        num_stages(config),
        device,
        input_args=(tokens if part.is_first else stream,),
        output_args=(loss if part.is_last else stream,),
        group=mesh["pp"].get_group(),
    )
