"""``compile.cuda_graph``: what a graph needs holds on CPUs, where nothing is captured, and no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.parallel import graphed
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.parallel.graphed import GraphedAccumulation
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.step import evaluate, read_batch, train_step

Keys = dict[str, Any]
SMALL: Keys = {
    "model.num_layers": 2,
    "model.dim": 16,
    "model.num_heads": 4,
    "model.vocab_size": 257,
    "moe.num_experts": 4,
    "moe.hidden_dim": 8,
    "moe.top_k": 2,
    "data.corpus": "random",
    "training.seq_len": 8,
    "training.microbatch_size": 1,
    "training.global_batch_size": 8,
    "training.param_dtype": "bfloat16",
    "checkpoint.enable": False,
}
CASES: dict[str, tuple[int, Keys]] = {
    "one rank": (1, {}),
    "in one dtype": (1, {"training.param_dtype": "float32"}),
    "one microbatch": (1, {"training.microbatch_size": 8}),
    "recomputed": (1, {"activation_checkpoint.mode": "full"}),
    "multi-token prediction": (1, {"model.mtp_depth": 2}),
    "two sources": (1, {"data.sources": [{"name": n, "corpus": "random", "weight": 1.0} for n in ("one", "two")]}),
    "fsdp": (2, {}),
    "experts outside of fsdp": (2, {"mesh.experts": "dp", "mesh.expert_ranks": 1}),
    "experts in float8": (1, {"moe.expert_dtype": "float8", "model.dim": 32}),
    "copies over dp": (2, {"mesh.dp_replicate": 2}),
}


def trained(keys: Keys, world_size: int) -> list[Any]:
    """Numbers of four steps, of an evaluation after each, and the weights at the end."""
    config = resolve(override(Config(), SMALL | keys), world_size)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, build_corpus(config))
    found: list[Any] = []
    for _ in range(4):
        result = train_step(trainer, read_batch(trainer, loader))
        found += [result.loss, result.grad_norm, result.routing.load_LE, result.mtp_loss_K, result.source_loss_N]
        found.append(evaluate(trainer, [read_batch(trainer, loader)]))
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.parts[0].parameters()]
    return [None if x is None else x.detach().tolist() for x in (*found, *weights)]


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_accumulation(name: str) -> None:
    world_size, keys = CASES[name]
    usual, in_place = (
        run_on_ranks(trained, world_size, keys | {"compile.cuda_graph": on}, world_size) for on in (False, True)
    )
    # Sums of two ranks are the same in any order.
    assert in_place == usual


def places(world_size: int) -> list[list[int]]:
    config = resolve(override(Config(), SMALL | {"compile.cuda_graph": True}), world_size)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, build_corpus(config))
    runner = trainer.runner
    assert isinstance(runner, GraphedAccumulation)
    found: list[list[int]] = []
    others: list[torch.Tensor] = []

    def look(*arguments: Any) -> Any:
        weights = [local_part(param) for param in trainer.parts[0].parameters()]
        assert all(weight.dtype == torch.bfloat16 for weight in weights)  # gathered before the microbatch
        out = microbatch(*arguments)
        found.append([tensor.data_ptr() for tensor in (*weights, *(local_part(held.tensor) for held in runner.sums))])
        return out

    for i in range(3):
        train_step(trainer, read_batch(trainer, loader))
        evaluate(trainer, [read_batch(trainer, loader)])
        # What is given back is taken by others.
        others += [torch.zeros(size) for size in range(8, 20_000, 8)]
        if i == 0:
            microbatch, runner.run = runner.run, look
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_and_sums_stay_where_they_are(world_size: int) -> None:
    for found in run_on_ranks(places, world_size, world_size):
        assert len(found) == 2 * 8 // world_size
        assert all(one == found[0] for one in found)
        assert len(set(found[0])) == len(found[0]) > 20
        assert 0 not in found[0]


class FakeGraph:
    """A graph that counts, in place of the device's."""

    replays = 0

    def replay(self) -> None:
        type(self).replays += 1


def test_a_function_is_captured_once_and_given_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: torch.no_grad())
    calls = []

    def function(x: torch.Tensor, nothing: None) -> tuple[torch.Tensor, None]:
        calls.append(x)
        return x + 1, nothing

    run = graphed.Graphed(function)
    outputs = [run(torch.tensor(float(i)), None) for i in range(5)]
    assert len(calls) == graphed.WARM_UP + 1
    assert FakeGraph.replays == 3
    assert calls[-1].item() == 4.0  # the captured input holds the last call's
    assert outputs[0][0].item() == 1.0
    assert outputs[-1][1] is None
    assert outputs[-1][0] is not run.output[0]


def test_what_waits_for_the_gpu_is_refused_in_words() -> None:
    from moe_dtensor.config.errors import ConfigError

    def waits(*_arguments: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    def refused() -> str:
        config = resolve(override(Config(), SMALL | {"compile.cuda_graph": True}), 1)
        trainer, loader = build(config, torch.device("cpu")), Loader(config, build_corpus(config))
        runner = trainer.runner
        assert isinstance(runner, GraphedAccumulation)
        runner.run = waits
        train_step(trainer, read_batch(trainer, loader))
        with pytest.raises(ConfigError) as error:
            train_step(trainer, read_batch(trainer, loader))
        return str(error.value)

    assert "waits for the GPU: CUDA error: operation not permitted" in run_on_ranks(refused, 1)[0]
