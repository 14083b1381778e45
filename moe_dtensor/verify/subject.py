"""What is judged: the library's own trainer on this rank, given the oracle's inputs. B sequences, S positions,
E experts, K choices."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_dtensor.checkpoint.folder import on_rank_0
from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.resolve import microbatches
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch
from moe_dtensor.layers.router import Router, Scores
from moe_dtensor.layers.tokens import Tokens
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.accumulation import Runner
from moe_dtensor.parallel.expert_copies import WithOwnExperts
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.parallel.graphed import GraphedAccumulation
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import to_device
from moe_dtensor.verify.oracle import Answer, Microbatch


class Recorder:
    """A runner that keeps every full gradient as the backward pass leaves it, before anything is clipped.

    A gradient that is missing is kept as None and filled with zeros, so that the step can go on and show the rest.

    Args:
        trainer: whose runner to take the place of.
        spoilt: steps, from 1, after whose backward pass the last rank finds one infinite number in a gradient.
    """

    def __init__(self, trainer: Trainer, spoilt: Collection[int] = ()) -> None:
        self.spoilt = spoilt
        self.steps = 0
        self.runner: Runner = trainer.runner
        self.parts = trainer.parts
        self.gradients: dict[str, Tensor | None] = {}

    def step(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward as the runner does them."""
        loss = self.runner.step(batch, scale)
        for part in self.parts:
            for name, param in part.named_parameters():
                self.gradients[name] = None if param.grad is None else full(param.grad)
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        self.steps += 1
        if self.steps in self.spoilt and dist.get_rank() == dist.get_world_size() - 1:
            grads = (param.grad for part in self.parts for param in part.parameters())
            held = (local_part(grad) for grad in grads if grad is not None)
            next(x for x in held if x.numel()).view(-1)[0] = torch.inf
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """As the runner does it."""
        return self.runner.evaluate(batch)

    def close(self) -> None:
        """As the runner does it."""
        self.runner.close()


def build_subject(
    config: Config,
    initial: Mapping[str, Tensor],
    device: torch.device,
    replayed: Sequence[Answer] = (),
    spoilt: Collection[int] = (),
) -> tuple[Trainer, Recorder]:
    """A trainer with the given initial values, and the recorder in place of its runner.

    Args:
        config: resolved.
        initial: full tensors by name.
        replayed: steps whose choices, and which of them are kept, to force in their order. None: the trainer's own.
            Without forcing, rounding in float32 sends some token to another expert.
        spoilt: see :class:`Recorder`.
    """
    trainer = build(config, device)
    load_parameters(trainer, initial)
    if replayed:
        _force_routing(trainer, replayed)
        # A graph would take the first choices again and again.
        _run_as_it_is(trainer.runner)
    recorder = Recorder(trainer, spoilt)
    return replace(trainer, runner=recorder), recorder


@torch.no_grad()
def load_parameters(trainer: Trainer, initial: Mapping[str, Tensor]) -> None:
    """Overwrite every parameter with this rank's part of a full tensor.

    Raises:
        KeyError: a parameter's name is not a checkpoint key.
        ValueError: its full shape is not the key's.
    """
    for part in trainer.parts:
        for name, param in part.named_parameters():
            value = initial[name].to(device=param.device, dtype=param.dtype)
            if param.shape != value.shape:
                raise ValueError(f"Parameter {name} has shape {tuple(param.shape)}, expected {tuple(value.shape)}.")
            if isinstance(param, DTensor):
                # Every rank holds the same full value: nothing needs to travel.
                value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(value)


def load_bias(trainer: Trainer, bias: Mapping[int, Tensor]) -> None:
    """Start every router's choice with the given bias, ``(E,)`` by its block's index."""
    for row_E, layer in zip(trainer.balance.bias_LE, sorted(bias), strict=True):
        row_E.copy_(bias[layer])


def full(tensor: Tensor) -> Tensor:
    """The whole of a distributed tensor, as this rank sees it; a copy."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def full_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Every parameter of this rank's parts, whole."""
    return {name: full(param) for part in trainer.parts for name, param in part.named_parameters()}


def restart(trainer: Trainer, again: Trainer) -> Trainer:
    """``again``, with all that a run saves of ``trainer`` loaded from a checkpoint."""
    folder = on_rank_0(lambda: tempfile.mkdtemp(prefix="moe_dtensor_verify_"))
    try:
        for act, one in (("save", trainer), ("load", again)):
            manager = CheckpointManager(
                folder, one.config, list(one.parts), one.optimizers, one.schedule, NoLoader(), one.balance
            )
            getattr(manager, act)(1)
    finally:
        dist.barrier()
        on_rank_0(lambda: shutil.rmtree(folder))
    return again


class NoLoader:
    """In place of a loader: batches are given."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


class Moments(NamedTuple):
    """AdamW's state of one parameter, whole."""

    first: Tensor
    second: Tensor
    updates: float


def moments(trainer: Trainer) -> dict[str, Moments]:
    """The optimizer's state of every parameter of this rank's parts."""
    found = {}
    for part, optimizer in zip(trainer.parts, trainer.optimizers, strict=True):
        for name, param in part.named_parameters():
            state = optimizer.state[param]
            found[name] = Moments(full(state["exp_avg"]), full(state["exp_avg_sq"]), float(state["step"]))
    return found


def own_share(trainer: Trainer, batch: Sequence[Microbatch]) -> Batch:
    """This dp rank's microbatches, joined as the loader would give them."""
    mine = batch[_own_microbatches(trainer)]
    tokens, labels = (torch.cat([getattr(m, name) for m in mine]) for name in ("tokens", "labels"))
    numbers = torch.tensor([number for m in mine for number in m.numbers or range(len(m.tokens))])
    if mine[0].documents is None:
        return to_device(Batch(tokens, labels, sequence_B=numbers), trainer.device)
    documents = torch.cat([m.documents for m in mine if m.documents is not None])
    return to_device(Batch(tokens, labels, positions_in(documents), documents, numbers), trainer.device)


def positions_in(documents_BS: Tensor) -> Tensor:
    """Position of each token since the last change of document."""
    index_S = torch.arange(documents_BS.shape[1])
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return index_S - torch.where(starts_BS, index_S, 0).cummax(dim=1).values


def _own_microbatches(trainer: Trainer) -> slice:
    each = microbatches(trainer.config)
    first = trainer.mesh["dp"].get_local_rank() * each
    return slice(first, first + each)


def _force_routing(trainer: Trainer, answers: Sequence[Answer]) -> None:
    size = trainer.config.training.microbatch_size
    for part in trainer.parts:
        for index in part.moe_layers:
            router = part.get_submodule(f"layers.{index}.moe.router")
            assert isinstance(router, Router)
            chosen, kept, evaluated = (
                [
                    t.to(trainer.device).unflatten(0, (size, -1))
                    for answer in answers
                    for t in getattr(answer, name).get(index, [])[_own_microbatches(trainer)]
                ]
                for name in ("routing", "kept", "validation_routing")
            )
            replay = Replay(part, router, list(zip(chosen, kept, strict=True)), evaluated)
            # On the instance: the module's own methods stay what they are.
            router.rank, router.keep = replay.rank, replay.keep  # type: ignore[method-assign]


def _run_as_it_is(runner: Runner) -> None:
    if isinstance(runner, WithOwnExperts):
        runner = runner.runner
    if isinstance(runner, GraphedAccumulation):
        runner.without_graph()


class Replay:
    """Choices from a list, and which of them are kept, one of each for each microbatch in order.

    A recomputed forward comes again at a time that only the schedule knows; it is told by its logits.

    Args:
        part: that the router is of.
        router: whose choices to make.
        coming: choices ``(B, S, K)`` and which are kept, of training.
        evaluated: choices of evaluation.
    """

    def __init__(
        self, part: Transformer, router: Router, coming: list[tuple[Tensor, Tensor]], evaluated: list[Tensor]
    ) -> None:
        self.part = part
        self.router = router
        self.coming = coming
        self.evaluated = evaluated
        self.seen: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.kept_BSK: Tensor | None = None

    def rank(self, scores: Scores, tokens: Tokens) -> tuple[Tensor, None]:
        """A ranking ``(B, S, E)`` of the tokens held, in which the choices come first, in their order, and no other."""
        logits_BSE = scores.logits_TE.detach().unflatten(0, scores.lead)
        if scores.whole is not None:
            scores.whole()  # nobody needs it, but it is under way
        if not self.router.training:
            return self._ranking(self._own(self.evaluated.pop(0)), logits_BSE), None
        # The same operations each time: selective recomputation counts them.
        told = logits_BSE.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        if told not in self.seen:
            chosen, kept_BSK = map(self._own, self.coming.pop(0))
            self.seen[told] = self._ranking(chosen, logits_BSE), kept_BSK
        ranking_BSE, self.kept_BSK = self.seen[told]
        return ranking_BSE, None

    def _own(self, x_BSK: Tensor) -> Tensor:
        return self.router.own_tokens(self.part.routed(x_BSK))

    @staticmethod
    def _ranking(chosen: Tensor, logits_BSE: Tensor) -> Tensor:
        places = torch.arange(chosen.shape[-1], 0, -1, device=chosen.device, dtype=logits_BSE.dtype)
        experts = logits_BSE.shape[-1]
        # One place more for ids of -1.
        ranking = logits_BSE.new_full((*chosen.shape[:-1], experts + 1), -torch.inf)
        ranking.scatter_(-1, chosen.where(chosen >= 0, experts), places.expand_as(chosen))
        return ranking[..., :experts].contiguous()

    def keep(self, gate_BSK: Tensor, expert_BSK: Tensor) -> Tensor:
        """Of the microbatch that was ranked last."""
        assert self.kept_BSK is not None
        return self.kept_BSK
