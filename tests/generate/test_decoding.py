"""Cached decoding is the full forward pass, for every kind of attention, mesh and placement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.config.check import check
from moe_dtensor.config.load import load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.generate import load as load_module
from moe_dtensor.generate.batch import Completion, Model, Sampling, complete
from moe_dtensor.generate.cache import Cache, Slots
from moe_dtensor.generate.decoder import is_kernels_only, open_decoder
from moe_dtensor.mesh import build_mesh
from moe_dtensor.model.balance_state import BalanceState
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.parallel.apply import build_parts
from moe_dtensor.testing.ranks import run_on_ranks

BASE = override(
    Config(),
    {
        "model.num_layers": 3,
        "model.dim": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.vocab_size": 61,
        "model.init_std": 0.3,
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "moe.layers": (1, 2),
        "moe.num_shared_experts": 1,
        "moe.selection_bias": True,
        "mesh.sequence_parallel": False,
        "training.seq_len": 16,
        "training.dtype": "float64",
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
    },
)
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "normed": {"model.qk_norm": "full", "model.attention_gate": True, "model.attention_bias": "all"},
    "latent": {
        "model.kv_rank": 12,
        "model.nope_dim": 8,
        "model.rope_dim": 4,
        "model.v_dim": 10,
        "model.num_kv_heads": 0,
    },
    "latent window": {
        "model.kv_rank": 12,
        "model.q_rank": 9,
        "model.nope_dim": 8,
        "model.rope_dim": 4,
        "model.v_dim": 10,
        "model.num_kv_heads": 0,
        "model.window": 4,
        "model.sinks": True,
    },
    "window": {"model.window": 5, "model.window_layers": ("window", "full"), "model.window_theta": 500.0},
    "window and sinks": {"model.window": 4, "model.sinks": True},
    "multi-token": {"model.mtp_depth": 1, "model.qk_norm": "head"},
}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 1, 4], [60, 2, 2, 2, 2, 9], [50, 40]]
END = 0


def generate(
    configs: Sequence[Config], mesh: tuple[int, int, int], sampling: Sampling
) -> list[tuple[list[Completion], float]]:
    found = []
    for config in configs:
        dp, pp, tp = mesh
        placed = override(config, {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp})
        check(placed, dp * pp * tp)
        resolved = resolve(placed, dp * pp * tp)
        device = torch.device("cpu")
        device_mesh = build_mesh(resolved, device)
        (part,) = build_parts(resolved, device_mesh, device, trains=False)
        balance = BalanceState(resolved, [part], device)
        balance.bias_LE.copy_(torch.randn(balance.bias_LE.shape, generator=torch.Generator().manual_seed(0)) / 10)
        model = Model(part.eval(), resolved, device_mesh, device)
        found.append(complete(model, PROMPTS, 9, sampling, [END], check=True))
    return found


def test_every_kind_of_attention_on_one_rank() -> None:
    configs = [override(BASE, changes) for changes in KINDS.values()]
    (results,) = run_on_ranks(generate, 1, configs, (1, 1, 1), Sampling())
    for name, (completions, error) in zip(KINDS, results, strict=True):
        assert error < 1e-12, name
        assert all(len(c.ids) == 9 or c.ended for c in completions)
        assert len({tuple(c.ids) for c in completions}) > 1


def cache_sizes(config: Config) -> list[list[tuple[int, ...]]]:
    """Shapes of what each layer keeps of two sequences, after 7 + 1 of 12 slots; then none keeps anything."""
    resolved, device = resolve(override(config, {"mesh.dp": 1}), 1), torch.device("cpu")
    mesh = build_mesh(resolved, device)
    (part,) = build_parts(resolved, mesh, device, trains=False)
    with open_decoder(part.eval(), resolved, mesh["tp"], Slots(torch.tensor([0, 3]), 12)) as decode:
        decode(torch.arange(14).reshape(2, 7))
        decode(torch.tensor([[1], [2]]))
        caches: list[Any] = [part.layers[str(layer)].attention.attend for layer in range(3)]  # type: ignore[union-attr]
        assert all(isinstance(cache, Cache) for cache in caches)
        sizes = [[tuple(held.shape) for held in cache.held] for cache in caches]
    assert not any(isinstance(part.layers[str(layer)].attention.attend, Cache) for layer in range(3))  # type: ignore[union-attr]
    return sizes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grouped", [[(2, 2, 12, 8)] * 2] * 3),
        ("window", [[(2, 2, rows, 8)] * 2 for rows in (5, 12, 5)]),
        # Of 4 heads of 12 and 10 the latent of 12 and a shared key of 4.
        ("latent", [[(2, 1, 12, 16)]] * 3),
        ("latent window", [[(2, 1, 4, 16)]] * 3),
    ],
)
def test_a_cache_keeps_what_can_still_be_seen(kind: str, expected: list[list[tuple[int, ...]]]) -> None:
    """Every layer kept keys and values of all heads at every position, whatever its window or latent."""
    (sizes,) = run_on_ranks(cache_sizes, 1, override(BASE, KINDS[kind]))
    assert sizes == expected


MESHES = [((1, 1, 4), "tp"), ((2, 1, 2), "tp"), ((2, 1, 2), "dp")]


def test_meshes_give_the_same_tokens() -> None:
    """Five prompts on two dp ranks, drawn: each has its own stream, and stands in another batch."""
    kinds = [KINDS["latent"], KINDS["window and sinks"] | {"model.num_kv_heads": 1}]
    configs = [override(BASE, changes) for changes in kinds]
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
    (alone,) = run_on_ranks(generate, 1, configs, (1, 1, 1), sampling)
    for mesh, experts in MESHES:
        placed = [override(config, {"mesh.experts": experts}) for config in configs]
        for results in run_on_ranks(generate, 4, placed, mesh, sampling):
            assert [completions for completions, _ in results] == [completions for completions, _ in alone], mesh
            assert all(error < 1e-12 for _, error in results), mesh


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_an_end_token_ends_a_completion(max_tokens: int) -> None:
    (((free, _),),) = run_on_ranks(generate, 1, [BASE], (1, 1, 1), Sampling())
    end = free[1].ids[4]
    (((ended, _),),) = run_on_ranks(with_end, 1, end, max_tokens)
    cut = free[1].ids[:max_tokens]
    assert ended[1].ids == (cut[: cut.index(end)] if end in cut else cut)
    assert ended[1].ended == (end in cut)


def with_end(end: int, max_tokens: int) -> list[tuple[list[Completion], float]]:
    resolved = resolve(override(BASE, {"mesh.dp": 1}), 1)
    device = torch.device("cpu")
    mesh = build_mesh(resolved, device)
    (part,) = build_parts(resolved, mesh, device)
    balance = BalanceState(resolved, [part], device)
    balance.bias_LE.copy_(torch.randn(balance.bias_LE.shape, generator=torch.Generator().manual_seed(0)) / 10)
    return [complete(Model(part.eval(), resolved, mesh, device), PROMPTS, max_tokens, Sampling(), [end])]


@pytest.mark.parametrize(
    ("changes", "replays"),
    [
        ({"moe.backend": "torch"}, True),
        ({"moe.backend": "reference"}, False),
        ({"moe.backend": "auto"}, False),  # reference, off CUDA
        ({"moe.backend": "torch", "moe.router": "own:Router"}, False),
        ({"moe.backend": "torch", "moe.num_experts": 0, "moe.layers": ()}, True),
    ],
)
def test_what_may_ask_the_device_is_not_replayed(changes: dict[str, Any], replays: bool) -> None:
    config = resolve(override(BASE, {k: v for k, v in changes.items() if k != "moe.router"}), 1)
    model = Transformer(config, range(config.model.num_layers), first=True, last=True)
    named = override(config, {"moe.router": changes.get("moe.router", "topk")})
    assert is_kernels_only(model, named) == replays


def test_what_trained_as_graphs_in_float8_generates_on_tp_ranks() -> None:
    """Neither goes with tp's collectives, or pays for single tokens."""
    trained = override(
        load(Path("train_configs/debug.toml")), {"compile.cuda_graph": True, "moe.expert_dtype": "float8"}
    )
    config = load_module._for_generation(trained, {"mesh.tp": 2}, 2)
    check(config, 2)
    assert not config.compile.cuda_graph
    assert config.moe.expert_dtype == "param"
    assert load_module._for_generation(trained, {"moe.expert_dtype": "float8"}, 1).moe.expert_dtype == "float8"


def test_what_trained_by_flash_attention_4_generates_without_it() -> None:
    trained = override(
        load(Path("train_configs/debug.toml")),
        {"model.attention_backend": "fa4", "training.param_dtype": "bfloat16"},
    )
    config = load_module._for_generation(trained, {}, 1)
    check(config, 1)
    assert config.model.attention_backend == "auto"
    wanted = {"model.attention_backend": "fa4"}
    assert load_module._for_generation(trained, wanted, 1).model.attention_backend == "fa4"
    trained = override(trained, {"moe.backend": "quack"})
    assert load_module._for_generation(trained, {}, 1).moe.backend == "auto"
    assert load_module._for_generation(trained, {"moe.backend": "quack"}, 1).moe.backend == "quack"
    named = override(trained, {"model.attention_backend": "plain"})
    assert load_module._for_generation(named, {}, 1).model.attention_backend == "plain"
