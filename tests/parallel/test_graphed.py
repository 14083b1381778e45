"""``compile.cuda_graph``: what a graph needs holds on CPUs, where nothing is captured, and no number changes."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel import graphed
from moe_dtensor.parallel.expert_copies import WithOwnExperts
from moe_dtensor.parallel.gradients import local_part
from moe_dtensor.parallel.graphed import GraphedAccumulation
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import loop
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import evaluate, read_batch, train_step
from tests.train.starts import Start, tiny
from tests.train.test_ends import wait_for_step

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
WORST: Keys = {"moe.rows": "worst"}
# The backend reference, which "auto" is on a CPU, would gather.
ONE_SIDED: Keys = WORST | {"mesh.dispatch": "one_sided", "moe.backend": "torch", "training.param_dtype": "float32"}
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
    "tp": (2, {"mesh.tp": 2} | WORST),
    "tp without sequence parallelism": (2, {"mesh.tp": 2, "mesh.sequence_parallel": False} | WORST),
    "slices of all experts": (2, {"mesh.tp": 2, "mesh.experts": "tp_hidden"}),
    "experts over dp": (2, {"mesh.experts": "dp"} | WORST),
    "experts over dp and tp": (4, {"mesh.tp": 2, "mesh.experts": "dp_tp"} | WORST),
    "lent experts": (2, {"mesh.tp": 2, "mesh.lent_experts": 1} | WORST),
    "one-sided over tp": (2, {"mesh.tp": 2} | ONE_SIDED),
    "one-sided over dp": (2, {"mesh.experts": "dp"} | ONE_SIDED),
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


def inner_runner(trainer: Trainer) -> GraphedAccumulation:
    runner = trainer.runner.runner if isinstance(trainer.runner, WithOwnExperts) else trainer.runner
    assert isinstance(runner, GraphedAccumulation)
    return runner


def read_weights(part: Transformer) -> list[torch.Tensor]:
    """What a microbatch reads: gathered weights, copies of experts outside of FSDP."""
    found = []
    for name, param in part.named_parameters():
        owner, _, attribute = name.rpartition(".")
        found.append(local_part(getattr(part.get_submodule(owner), f"{attribute}_copy", param)))
    return found


def places(keys: Keys, world_size: int) -> list[list[int]]:
    config = resolve(override(Config(), SMALL | {"compile.cuda_graph": True} | keys), world_size)
    trainer, loader = build(config, torch.device("cpu")), Loader(config, build_corpus(config))
    runner = inner_runner(trainer)
    found: list[list[int]] = []
    others: list[torch.Tensor] = []

    def look(*arguments: Any) -> Any:
        weights = read_weights(trainer.parts[0])
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


@pytest.mark.parametrize("name", ["one rank", "fsdp", "tp", "experts over dp"])
def test_weights_and_sums_stay_where_they_are(name: str) -> None:
    world_size, keys = CASES[name]
    for found in run_on_ranks(places, world_size, keys, world_size):
        assert len(found) == 2 * 8 // (1 if "mesh.tp" in keys else world_size)
        assert all(one == found[0] for one in found)
        assert len(set(found[0])) == len(found[0]) > 20
        assert 0 not in found[0]


class FakeGraph:
    """A graph that counts, in place of the device's."""

    replays = held = 0

    def __init__(self) -> None:
        FakeGraph.held += 1

    def replay(self) -> None:
        FakeGraph.replays += 1

    def reset(self) -> None:
        FakeGraph.held -= 1


def test_a_function_is_captured_once_and_given_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: torch.no_grad())
    monkeypatch.setattr(FakeGraph, "replays", 0)
    monkeypatch.setattr(FakeGraph, "held", 0)
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
    assert FakeGraph.held == 1
    run.release()
    run.release()
    assert FakeGraph.held == 0


def count_graphs(_rank: int) -> None:
    """Have a rank on a CPU make graphs that count, and say before its process group ends how many there are."""
    torch.cuda.CUDAGraph, torch.cuda.graph = FakeGraph, lambda *args, **kwargs: nullcontext()  # type: ignore
    begin, end = GraphedAccumulation.__init__, loop.end_ranks

    def with_graph(self: GraphedAccumulation, *arguments: Any) -> None:
        begin(self, *arguments)
        self.run = graphed.Graphed(self.run)

    def end_ranks() -> None:
        print(f"{FakeGraph.replays > 0} replays, {FakeGraph.held} graphs")
        end()

    GraphedAccumulation.__init__, loop.end_ranks = with_graph, end_ranks  # type: ignore


@pytest.mark.parametrize("ends", ["at its last step", "when asked", "after two stages"])
def test_no_graph_outlives_the_process_group(tmp_path: Path, ends: str) -> None:
    """NCCL ends no communicator whose collectives a graph holds."""
    steps = "300" if ends == "when asked" else "5"
    changes = {"compile__cuda_graph": "true", "training__steps": steps, "moe__rows": "worst", "mesh__experts": "dp"}
    argv = tiny(tmp_path / "run", **changes)
    if ends == "after two stages":
        (tmp_path / "tiny.toml").write_text("[[stages]]\nfrom_step = 3\nseq_len = 32\nglobal_batch_size = 8\n")
    start = Start(tmp_path, argv, 2, before=count_graphs)
    if ends == "when asked":
        wait_for_step(tmp_path / "run", 3)
        os.kill(start.pids[1], signal.SIGTERM)
    ended = start.wait()
    assert ended.statuses == [75 if ends == "when asked" else 0] * 2, ended.text
    assert ended.text.count("True replays, 0 graphs") == 2, ended.text


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
