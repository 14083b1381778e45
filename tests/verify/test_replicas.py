"""What all ranks must agree on: the norm, the decision on a bad gradient, replicas to the last bit, repetition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dtensor.config.errors import FAILED, RunError
from moe_dtensor.config.load import override
from moe_dtensor.config.schema import Config
from moe_dtensor.data import build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.loop import Run
from moe_dtensor.train.run_folder import open_run_folder
from moe_dtensor.train.step import train_step
from moe_dtensor.verify.inputs import global_batch, initial_values
from moe_dtensor.verify.miniature import Case, Layout
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.subject import load_parameters, own_share

from . import mutations

CPU = torch.device("cpu")
CUBE = Layout(2, 2, 2, "1F1B")
# The first stage is all dense, and both tp ranks hold the one key/value head.
CONFIG = override(
    Config(),
    {
        "model.num_layers": 2,
        "model.dim": 24,
        "model.num_heads": 4,
        "model.num_kv_heads": 1,
        "model.head_dim": 8,
        "model.hidden_dim": 40,
        "model.qk_norm": "head",
        "moe.layers": (1,),
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "training.seq_len": 8,
        "training.microbatch_size": 1,
        "training.global_batch_size": 4,
        "training.param_dtype": "float32",
        "training.max_grad_norm": 0.1,
        "lr_scheduler.warmup_steps": 2,
        "checkpoint.enable": False,
    },
)
FLOAT64 = {"training.dtype": "float64", "training.param_dtype": "float64", "training.reduce_dtype": "float64"}


def test_both_norms_and_what_they_clip_are_the_oracles_on_every_rank() -> None:
    config = override(CONFIG, FLOAT64 | {"model.vocab_size": 101})
    orders = [override(config, {"training.norm_type": order}) for order in (2.0, math.inf)]
    verdicts = list(prove([Case(CUBE, config) for config in orders]))
    assert all(verdict.ok for verdict in verdicts), [verdict.worst for verdict in verdicts]


def trainer_with_values(config: Config) -> Trainer:
    trainer = build(config, CPU)
    load_parameters(trainer, initial_values(config))
    return trainer


def locals_of(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for part in trainer.parts:
        for name, param in part.named_parameters():
            assert isinstance(param, DTensor)
            yield name, param.detach().to_local()


class Poisoned:
    """A runner that leaves one bad gradient on one rank, in one step."""

    def __init__(self, trainer: Trainer, rank: int, bad_step: int, value: float = math.inf) -> None:
        self.value = value
        self.runner, self.parts = trainer.runner, trainer.parts
        self.rank, self.bad_step = rank, bad_step
        self.steps = 0

    def step(self, batch: Any, scale: Tensor) -> Tensor:
        loss = self.runner.step(batch, scale)
        self.steps += 1
        if dist.get_rank() == self.rank and self.steps == self.bad_step:
            grad = next(self.parts[-1].parameters()).grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0] = self.value
        return loss

    def close(self) -> None:
        self.runner.close()


def step_with_bad_gradient(config: Config, value: float) -> tuple[bool, bool]:
    trainer = trainer_with_values(config)
    before = {name: value.clone() for name, value in locals_of(trainer)}
    poisoned = replace(trainer, runner=Poisoned(trainer, 3, 1, value))  # type: ignore[arg-type]
    result = train_step(poisoned, own_share(trainer, global_batch(config)))
    return bool(result.finite), all(torch.equal(before[name], value) for name, value in locals_of(trainer))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("order", [2.0, math.inf])
def test_a_bad_gradient_on_one_rank_is_refused_by_all(order: float, value: float) -> None:
    config = CUBE.place(override(CONFIG, {"training.norm_type": order, "model.vocab_size": 101}))
    assert run_on_ranks(step_with_bad_gradient, 8, config, value) == [(False, True)] * 8


def run_with_infinite_gradient(config: Config) -> tuple[int, int]:
    corpus = build_corpus(config)
    config = set_vocabulary(config, corpus)
    run = Run(config, CPU, corpus, open_run_folder(config, corpus.fingerprint()))
    run.trainer = replace(run.trainer, runner=Poisoned(run.trainer, 3, 2))  # type: ignore[arg-type]
    try:
        return run.to_the_end(), run.step
    except RunError:
        return FAILED, run.step


@pytest.mark.parametrize(("policy", "status", "last_step"), [("skip", 0, 4), ("stop", 1, 2)])
def test_every_rank_follows_the_configured_policy(policy: str, status: int, last_step: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i}\n" for i in range(2000)), encoding="utf-8")
    config = override(
        CONFIG,
        {
            "training.nonfinite": policy,
            "training.steps": 4,
            "data.corpus": "files",
            "data.path": str(text),
            "run.folder": str(tmp_path / "run"),
        },
    )
    assert run_on_ranks(run_with_infinite_gradient, 8, CUBE.place(config)) == [(status, last_step)] * 8


def twenty_steps(config: Config) -> list[str]:
    """Names of replicated tensors of which some rank's copy is not bit-equal."""
    trainer = trainer_with_values(config)
    for step in range(20):
        batch = global_batch(replace(config, training=replace(config.training, seed=step)))
        train_step(trainer, own_share(trainer, batch))
    tp = trainer.mesh["tp"]
    apart, compared = [], 0
    for part in trainer.parts:
        for name, param in part.named_parameters():
            assert isinstance(param, DTensor)
            if not param.placements[-1].is_replicate():
                continue
            local = param.detach().to_local().contiguous()
            copies = [torch.empty_like(local) for _ in range(tp.size())]
            dist.all_gather(copies, local, group=tp.get_group())
            apart += [name for copy in copies if not torch.equal(copy, local)]
            compared += 1
    assert compared > 0
    return apart


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(1, 1, 4), marks=pytest.mark.full), CUBE], ids=lambda layout: layout.mesh
)
def test_after_twenty_clipped_steps_replicas_are_bit_equal(layout: Layout) -> None:
    config = layout.place(override(CONFIG, {"model.vocab_size": 101, "optimizer.lr": 1e-2}))
    assert run_on_ranks(twenty_steps, layout.world_size, config) == [[]] * layout.world_size


def test_replicas_that_part_are_seen() -> None:
    layout = Layout(1, 1, 2)
    with mutations.router_not_reduced():
        first, second = run_on_ranks(twenty_steps, 2, layout.place(override(CONFIG, {"model.vocab_size": 101})))
    assert first == second
    assert "layers.1.moe.router.weight" in first


def three_steps(config: Config) -> tuple[list[float], dict[str, bytes]]:
    trainer = build(config, CPU)
    losses = []
    for step in range(3):
        batch = global_batch(replace(config, training=replace(config.training, seed=step)))
        losses.append(float(train_step(trainer, own_share(trainer, batch)).loss))
    return losses, {name: value.numpy().tobytes() for name, value in locals_of(trainer)}


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(2, 2, 1, "1F1B")], ids=lambda layout: layout.mesh)
def test_a_deterministic_run_repeats_to_the_last_bit(layout: Layout) -> None:
    config = layout.place(override(CONFIG, {"training.deterministic": True, "model.vocab_size": 101}))
    first, second = (run_on_ranks(three_steps, layout.world_size, config) for _ in range(2))
    assert first == second
    losses = first[0][0]
    assert len(set(losses)) == 3
    assert all(math.isfinite(loss) for loss in losses)
