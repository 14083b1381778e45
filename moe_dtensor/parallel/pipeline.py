"""Forward and backward over all microbatches of a step through pipeline stages.

M microbatches, S stages.

Forward only, whatever the schedule of training is: a schedule of torch's carries state from forward to backward, and
sets its stages up anew when it goes from one mode to the other. In :class:`ForwardPass` nothing is kept between
two calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import SPLIT_BACKWARD, microbatches, num_stages, rank_stages, stream_width, tp_axis
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.estimate.memory import settle_accumulate
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.accumulation import Accumulation, Arguments, Runner, split
from moe_dtensor.parallel.expert_copies import WithOwnExperts, has_own_experts
from moe_dtensor.parallel.fsdp import reduce_each, reduce_now
from moe_dtensor.parallel.graphed import GraphedAccumulation

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


def stream_shape(config: Config) -> tuple[int, int, int]:
    """What travels between stages: what a rank holds of a microbatch ``(B, S, D)``, wider with multi-token
    prediction."""
    held = [config.training.microbatch_size, config.training.seq_len]
    if (axis := tp_axis(config)) is not None:
        held[axis] //= config.mesh.tp
    return held[0], held[1], stream_width(config)


class ForwardPass:
    """Microbatch m passes stage s at tick m + s, so that after S ticks every stage is at work.

    In a tick each rank first runs its stages, then exchanges what goes on to the next, in one batch. Both ends of a
    transfer are in the batch of the same tick, whatever the order of stages on ranks: none waits for a later one.

    Args:
        parts: this rank's stages.
        config: resolved.
        mesh: (dp, pp, tp).
        device: of this rank.
    """

    def __init__(self, parts: list[Transformer], config: Config, mesh: DeviceMesh, device: torch.device) -> None:
        self.parts = dict(zip(rank_stages(config, mesh["pp"].get_local_rank()), parts, strict=True))
        self.count = num_stages(config)
        self.group = mesh["pp"].get_group()
        self.here = mesh["pp"].get_local_rank()
        self.rank_of = {stage: rank for rank in range(config.mesh.pp) for stage in rank_stages(config, rank)}
        self.shape = stream_shape(config)
        self.dtype = getattr(torch, config.training.param_dtype)
        self.device = device

    @torch.no_grad()
    def __call__(self, microbatches: list[Arguments]) -> Tensor:
        """The loss summed over all targets; 0 on ranks without the last stage."""
        # NCCL makes a group's communicator when all of its ranks meet; a transfer is between two of them.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        arrived: dict[int, Tensor] = {}
        for tick in range(len(microbatches) + self.count - 1):
            left: dict[int, Tensor] = {}
            for stage, part in self.parts.items():
                if 0 <= tick - stage < len(microbatches):
                    tokens, labels, positions, documents, _, sequence = microbatches[tick - stage]
                    x = tokens if part.is_first else arrived[stage]
                    left[stage] = part(x, labels, positions, documents, tokens, sequence)
                    if part.is_last:
                        total += left[stage].sum()
            arrived = self._pass_on(left, [s for s in range(self.count - 1) if 0 <= tick - s < len(microbatches)])
        return total

    def _pass_on(self, left: dict[int, Tensor], stages: list[int]) -> dict[int, Tensor]:
        """Send on what this rank's ``stages`` put out; what arrives here, by the stage that takes it."""
        arrived, transfers = {}, []
        for stage in stages:
            sender, receiver = self.rank_of[stage], self.rank_of[stage + 1]
            if sender == receiver == self.here:
                arrived[stage + 1] = left[stage]
            elif sender == self.here:
                transfers.append(self._transfer(dist.isend, left[stage].contiguous(), receiver))
            elif receiver == self.here:
                arrived[stage + 1] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                transfers.append(self._transfer(dist.irecv, arrived[stage + 1], sender))
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return arrived

    def _transfer(self, op: object, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, x, group=self.group, group_peer=peer)  # type: ignore[arg-type]


FIRST_TORCH_TO_SPLIT = (2, 13)
"""torch 2.11 loses autograd nodes of the experts between the two halves of a backward pass, and its V schedules hang on
gloo; 2.12 was not tried."""


def build_runner(parts: list[Transformer], config: Config, mesh: DeviceMesh, device: torch.device) -> Runner:
    """Accumulation for pp = 1, else the pipeline schedule."""
    runner: Runner
    if config.compile.cuda_graph:
        runner = GraphedAccumulation(parts[0], config, device)
    elif config.mesh.pp == 1:
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

    def close(self) -> None:
        """Nothing is held."""


def _build_stage(
    part: Transformer, index: int, config: Config, mesh: DeviceMesh, device: torch.device
) -> PipelineStage:
    """A stage whose shapes are given, so that nothing is run to infer them."""
    from torch.distributed.pipelining import PipelineStage

    stage_class = PipelineStage
    if settle_accumulate(config).fsdp.accumulate == "sharded":
        if not hasattr(PipelineStage, "perform_reduce_grad"):  # what ends a step's reductions
            raise ConfigError(
                f"fsdp.accumulate = sharded under a pipeline needs a newer torch than {torch.__version__}.",
                "Set fsdp.accumulate = whole, or mesh.pp = 1.",
            )
        stage_class = _reducing_stage()

    training = config.training
    dtype = getattr(torch, training.param_dtype)
    stream = torch.empty(stream_shape(config), device="meta", dtype=dtype, requires_grad=True)
    tokens = torch.empty(training.microbatch_size, training.seq_len, device="meta", dtype=torch.int64)
    loss_dtype = torch.promote_types(dtype, torch.float32)
    loss = torch.empty(training.microbatch_size, device="meta", dtype=loss_dtype, requires_grad=True)
    return stage_class(
        part,
        index,
        num_stages(config),
        device,
        input_args=(tokens if part.is_first else stream,),
        output_args=(loss if part.is_last else stream,),
        group=mesh["pp"].get_group(),
    )


def _reducing_stage() -> type[PipelineStage]:
    """A stage that reduces the gradients of each microbatch over dp (``fsdp.accumulate = sharded``), where torch's
    keeps whole ones for a step."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining._backward import stage_backward

    class ReducingStage(PipelineStage):
        def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
            """One microbatch's backward pass, or half of it; what torch's returns.

            A whole one is reduced block by block as it goes. Halves run outside of FSDP's hooks: the gradients that the
            second leaves are reduced after it.
            """
            assert isinstance(self.submod, FSDPModule)
            if backward_type != "full":
                result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last_backward)
                if backward_type == "weight":
                    reduce_now(self.submod, last_backward)
                return result
            reduce_each(self.submod, last_backward)
            values = bwd_kwargs["input_values"]
            return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], values), None

    return ReducingStage
