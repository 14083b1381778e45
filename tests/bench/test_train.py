"""``bench train --peers``: ours and torchtitan's model of the same sizes, trained in one run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_dtensor.bench.torchtitan_model import check_peer, differences
from moe_dtensor.bench.train import Options, bench_train
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.model import Model, Moe
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config, Data, Training
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train import loop

pytest.importorskip("torchtitan")

CONFIG = Config(
    model=Model(num_layers=2, dim=64, num_heads=4, qk_norm="full", vocab_size=257),
    moe=Moe(num_experts=4, top_k=2, hidden_dim=32, num_shared_experts=1),
    training=Training(seq_len=32, global_batch_size=4, microbatch_size=2, param_dtype="float32"),
    data=Data(corpus="random"),
)


def bench(config: Config, path: Path, peers: tuple[str, ...]) -> None:
    # The ranks are there already.
    loop.dist.barrier()
    import moe_dtensor.bench.train as module

    module.start_ranks = lambda config: torch.device("cpu")
    module.end_ranks = lambda: None
    assert bench_train({"": resolve(config, loop.dist.get_world_size())}, Options(1, 2, False, path, peers)) == 0


@pytest.mark.parametrize(
    ("ranks", "peers"),
    [
        (1, ("torchtitan",)),
        pytest.param(1, ("torchtitan", "torchtitan_amp"), marks=pytest.mark.full),
        pytest.param(2, ("torchtitan",), marks=pytest.mark.full),
    ],
)
def test_peers_train_on_the_same_batches(tmp_path: Path, ranks: int, peers: tuple[str, ...]) -> None:
    path = tmp_path / "out.json"
    run_on_ranks(bench, ranks, CONFIG, path, peers)
    record = json.loads(path.read_text())
    assert [peer["name"] for peer in record["peers"]] == list(peers)
    for peer in record["peers"]:
        assert peer["microbatch_size"] == 2
        assert "chooses experts by top-k, not by sinkhorn" in peer["differences"]
        assert peer["result"]["tokens_per_second"] > 0
        # Two models of one size after three steps from near-uniform predictions on random tokens.
        assert peer["result"]["loss"] == pytest.approx(math.log(257), rel=0.15)
    assert record["result"]["loss"] == pytest.approx(math.log(257), rel=0.15)


@pytest.mark.parametrize(
    ("config", "world", "reason"),
    [
        (replace(CONFIG, model=replace(CONFIG.model, activation="gelu")), 1, "no model.activation = gelu"),
        (replace(CONFIG, moe=replace(CONFIG.moe, every=2)), 1, "every block of it has experts"),
        (CONFIG, 3, "no multiple of 3 ranks"),
    ],
)
def test_what_the_peer_cannot_be_is_told(config: Config, world: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_peer("torchtitan", resolve(config, world), world)


def test_what_the_peer_does_otherwise_is_told() -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, router="topk"), model=replace(CONFIG.model, qk_norm="head"))
    assert differences(resolve(config, 1), torch.device("cuda")) == []
