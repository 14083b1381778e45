"""Every choice in ``[moe]``, on meshes, step after step; and what a coefficient does to a gradient."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.schema import Config
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.step import evaluate, train_step
from moe_dtensor.verify import inputs
from moe_dtensor.verify.miniature import Case, Layout, legal
from moe_dtensor.verify.oracle import steps
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.subject import build_subject, load_parameters, own_share
from moe_dtensor.verify.verdict import Verdict

from .routing_cases import MESH_SETS, TABLES, dimensions, possible, routing_cases, settings

MESHES = [
    pytest.param(mesh, marks=[pytest.mark.full] if number or mesh == "2x2x1" else [])
    for number, meshes in enumerate(MESH_SETS)
    for mesh in meshes
]
"""Every pair of choices meets in each of the sets; two meshes of the first are proven by default."""
TP, PP = Layout(2, 1, 2), Layout(1, 2, 2, "1F1B")
CONFIG = override(
    Config(),
    {
        "model.num_layers": 2,
        "model.dim": 16,
        "model.num_heads": 2,
        "model.head_dim": 4,
        "model.vocab_size": 61,
        "moe.num_experts": 8,
        "moe.hidden_dim": 8,
        "data.corpus": "random",
        "training.seq_len": 8,
        "training.microbatch_size": 2,
        "training.global_batch_size": 8,
        "training.dtype": "float64",
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
        "checkpoint.enable": False,
    },
)


def explain(verdict: Verdict) -> str:
    return f"{verdict.mesh} {verdict.schedule}: {verdict.worst}, also {verdict.failed()[:10]} {verdict.failure}"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.full)], ids=["a_third", "all"])
def test_all_pairs_of_routing_choices(mesh: str, every: int) -> None:
    cases = [case for case in routing_cases() if case.layout.mesh == mesh][::every]
    assert len(cases) * every >= 10
    for case, verdict in zip(cases, prove(cases), strict=True):
        assert verdict.ok, f"{explain(verdict)}\n{case.config.moe}"


def test_every_pair_that_is_not_refused_meets_on_two_meshes() -> None:
    met = defaultdict(set)
    for meshes in MESH_SETS:
        for setting in settings(meshes):
            assert possible(meshes, setting)
            for pair in itertools.combinations(setting.items(), 2):
                met[pair].add(setting["mesh"])
    assert len(set().union(*MESH_SETS)) == sum(map(len, MESH_SETS)), "the sets are disjoint"
    missing = []
    for meshes in MESH_SETS:
        # Pipelines are in one of the sets only.
        values = {name: o for name, o in dimensions(meshes).items() if name not in ("mesh", "schedule")}
        for a, b in itertools.combinations(values, 2):
            for pair in itertools.product([(a, v) for v in values[a]], [(b, v) for v in values[b]]):
                if possible(meshes, dict(pair)) and len(met[pair]) < 2:
                    missing.append(pair)
    assert not missing


def test_a_pair_is_left_out_only_where_the_config_refuses_it() -> None:
    """``possible`` repeats rules of the config's; it must not leave out more than they do."""
    refused = set()
    for a, b in itertools.combinations(TABLES, 2):
        for va, vb in itertools.product(TABLES[a], TABLES[b]):
            config = override(CONFIG, {"moe.top_k": 2} | TABLES[a][va] | TABLES[b][vb])
            accepted = legal(config, [TP, PP])
            assert accepted == possible(MESH_SETS[0], {a: va, b: vb, "top_k": 2}), (va, vb)
            refused |= set() if accepted else {(va, vb)}
    assert len(refused) == 25


FIVE_STEPS = override(
    CONFIG,
    {
        "moe.router": "topk",
        "moe.bias_rate": 0.02,
        "moe.balance_loss": 0.3,
        "moe.balance_over": "batch",
        "moe.z_loss": 0.05,
        "moe.jitter": 0.1,
        "moe.capacity_factor": 1.25,
        "activation_checkpoint.mode": "full",
        "lr_scheduler.warmup_steps": 5,
        "optimizer.lr": 0.02,
        "training.global_batch_size": 12,
    },
)


@pytest.mark.parametrize("layout", [TP, pytest.param(PP, marks=pytest.mark.full)], ids=lambda layout: layout.mesh)
def test_bias_and_counters_equal_the_oracles_after_five_steps(layout: Layout) -> None:
    """With accumulation and recomputation, on every rank; parameters and all diagnostics too."""
    (verdict,) = prove([Case(layout, FIVE_STEPS, steps=5)])
    assert verdict.ok, explain(verdict)
    compared = {d.name for d in verdict.deviations}
    names = ("load", "bias", "previous_load", "dropped", "churn", "balance_loss", "router_z")
    assert compared >= {f"layers.{i}.moe.{name}" for i in (0, 1) for name in names}


def test_the_five_steps_are_not_trivial() -> None:
    """Experts overflow, loads move, and biases come to differ by several rates."""
    config = TP.place(FIVE_STEPS)
    batches = [inputs.global_batch(config, step) for step in range(1, 6)]
    answers = steps(config, inputs.initial_values(config), batches)
    last = answers[-1]
    for layer in (0, 1):
        assert last.means[layer]["dropped"] > 0.02
        assert last.means[layer]["churn"] > 0.02
        assert len(set(last.bias[layer].tolist())) >= 3
    assert len({answer.loss for answer in answers}) == 5


COMPILED: list[dict[str, Any]] = [
    {"moe.router": "zipf"},
    {"moe.router": "expert_choice", "moe.balance_loss": 0.1, "moe.balance_over": "sequence"},
    {
        "moe.router": "topk",
        "moe.bias_rate": 0.1,
        "moe.jitter": 0.1,
        "moe.balance_loss": 0.1,
        "moe.balance_over": "batch",
        "moe.z_loss": 0.1,
        "moe.capacity_factor": 1.1,
    },
    {"moe.expert_groups": 4, "moe.expert_groups_kept": 2, "moe.normalize_gates": True},
]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_route_and_balance_alike() -> None:
    """Noise and capacity once could not be compiled: 64-bit constants became symbols, a fraction broke the graph."""
    compiled = override(CONFIG, {"compile.enable": True})
    cases = [Case(Layout(1, 1, 2), override(compiled, changes), steps=2) for changes in COMPILED]
    for verdict in prove(cases):
        assert verdict.ok, explain(verdict)


def test_ranks_route_for_groups_of_their_own() -> None:
    """By ids, by numbers of tokens, with a capacity and a balancing loss of the group: all of its own sequences."""
    own = {"training.microbatch_size": 4, "training.global_batch_size": 8, "moe.group_sequences": 2}
    ways: list[dict[str, Any]] = [
        {"moe.router": "hash"},
        {"moe.router": "zipf"},
        {"moe.jitter": 0.1, "moe.capacity_factor": 1.1, "moe.balance_loss": 0.1, "moe.balance_over": "group"},
    ]
    for verdict in prove([Case(Layout(1, 1, 2), override(CONFIG, own | way)) for way in ways]):
        assert verdict.ok, explain(verdict)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_block_keeps_the_copies_that_it_chose() -> None:
    """torch 2.13's compiler once let all copies go: it read which are kept before they were written."""
    limits = {"moe.bias_rate": 0.1, "moe.capacity_factor": 1.1, "moe.balance_loss": 0.1, "moe.balance_over": "batch"}
    config = override(CONFIG, {"compile.enable": True, "moe.router": "topk", **limits})
    (verdict,) = prove([Case(Layout(1, 1, 1), config, steps=1)])
    assert verdict.ok, explain(verdict)


LOSSES: list[dict[str, Any]] = [
    *({"moe.balance_loss": 0.5, "moe.balance_over": over} for over in ("sequence", "group", "batch")),
    {"moe.z_loss": 0.25},
]


def gradients_of(configs: Sequence[Config]) -> list[tuple[dict[str, Tensor], float]]:
    """Of each config: the gradients of this rank's parts, whole, and the reported loss."""
    results = []
    for config in configs:
        trainer, recorder = build_subject(config, inputs.initial_values(config), torch.device("cpu"))
        trainer.balance.previous_load_LE.copy_(torch.arange(16.0).view(2, 8).flip(0))
        loss = train_step(trainer, own_share(trainer, inputs.global_batch(config))).loss
        gradients = {name: value for name, value in recorder.gradients.items() if value is not None}
        results.append((gradients, float(loss)))
    return results


def on_mesh(layout: Layout, configs: Sequence[Config]) -> list[tuple[dict[str, Tensor], float]]:
    ranks = run_on_ranks(gradients_of, layout.world_size, [layout.place(config) for config in configs])
    return [
        ({name: g for rank in ranks for name, g in rank[i][0].items()}, ranks[0][i][1]) for i in range(len(configs))
    ]


def distance(a: dict[str, Tensor], b: dict[str, Tensor], times: float = 1.0) -> float:
    return float(sum((a[name] - times * b[name]).square().sum() for name in a)) ** 0.5


@pytest.mark.full
def test_gradients_are_linear_in_every_coefficient_and_the_loss_does_not_see_it() -> None:
    """g(2c) - g(0) = 2 (g(c) - g(0)), and alike on all meshes: counted once, whatever is split."""
    base = override(CONFIG, {"activation_checkpoint.mode": "full"})
    doubled = [{k: 2 * v if isinstance(v, float) else v for k, v in loss.items()} for loss in LOSSES]
    configs = [override(base, changes) for changes in ({}, *LOSSES, *doubled)]
    found = {layout.mesh: on_mesh(layout, configs) for layout in (TP, PP)}
    for (zero, loss_of_zero), *others in found.values():
        assert [loss for _, loss in others] == [loss_of_zero] * len(others)
        for (once, _), (twice, _) in zip(others[: len(LOSSES)], others[len(LOSSES) :], strict=True):
            slope, double = ({n: g[n] - zero[n] for n in zero} for g in (once, twice))
            size = distance(slope, slope, 0.0)
            assert all(float(slope[f"layers.{i}.moe.router.weight"].norm()) > 0.01 * size > 1e-4 for i in (0, 1))
            assert distance(double, slope, 2.0) < 1e-12 * size
    for (a, _), (b, _) in zip(*found.values(), strict=True):
        assert distance(a, b) < 1e-12 * distance(a, a, 0.0)


EVALUATED: list[dict[str, Any]] = [
    {"moe.router": "sinkhorn", "moe.expert_groups": 4, "moe.expert_groups_kept": 2, "moe.bias_rate": 0.1},
    {"moe.router": "topk", "moe.jitter": 0.5, "moe.capacity_factor": 0.5, "moe.bias_rate": 0.1},
    {"moe.router": "expert_choice"},
    {"moe.router": "hash"},
    {"moe.router": "zipf"},
]


def losses_of(configs: Sequence[Config]) -> list[tuple[float, float]]:
    """Of each config: the validation loss with biases that differ, and the same once more after a step."""
    results = []
    for config in configs:
        trainer = build(config, torch.device("cpu"))
        load_parameters(trainer, inputs.initial_values(config))
        trainer.balance.bias_LE.copy_(torch.arange(16.0).view(2, 8).flip(1) / 50)
        batch = own_share(trainer, inputs.global_batch(config))
        before = float(evaluate(trainer, [batch]))
        train_step(trainer, batch)
        results.append((before, float(evaluate(trainer, [batch]))))
    return results


def test_validation_losses_are_alike_on_all_meshes() -> None:
    configs = [override(CONFIG, changes | {"optimizer.lr": 0.1}) for changes in EVALUATED]
    found = [
        run_on_ranks(losses_of, layout.world_size, [layout.place(config) for config in configs])
        for layout in (Layout(1, 1, 1), TP, PP)
    ]
    for ranks in found:
        for losses, expected in zip(ranks, [found[0][0]] * len(ranks), strict=True):
            assert losses == [pytest.approx(pair, rel=1e-12) for pair in expected]
    assert len({loss for pair in found[0][0] for loss in pair}) == 2 * len(EVALUATED)
