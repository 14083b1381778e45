"""``verify`` catches what it is there to catch, and names it. A proof that cannot fail proves nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from moe_dtensor.config.load import override
from moe_dtensor.config.schema import Config
from moe_dtensor.verify.miniature import Case, Layout
from moe_dtensor.verify.run import prove
from moe_dtensor.verify.verdict import Verdict

from . import mutations, mutations_attention, mutations_balance

TP2, DP2, PP2 = Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 2, 1, "1F1B")
CONFIG = override(
    Config(),
    {
        "model.num_layers": 2,
        "model.dim": 24,
        "model.num_heads": 4,
        "model.num_kv_heads": 1,
        "model.head_dim": 8,
        "model.hidden_dim": 40,
        "model.vocab_size": 101,
        "moe.num_experts": 4,
        "moe.hidden_dim": 16,
        "data.corpus": "random",
        "training.seq_len": 8,
        "training.microbatch_size": 1,
        "training.global_batch_size": 4,
        "training.dtype": "float64",
        "training.param_dtype": "float64",
        "training.reduce_dtype": "float64",
        "checkpoint.enable": False,
    },
)


@dataclass(frozen=True)
class Expected:
    """What the verdict has to say: the worst quantity (a regular expression), its kind, its ratio of norms."""

    mutation: mutations.Mutation
    worst: str
    kind: str = "gradient"
    ratio: float | None = None
    layout: Layout = TP2
    changes: dict[str, Any] = field(default_factory=dict)


MUTATIONS = [
    Expected(mutations.router_not_reduced, r"layers\.\d\.moe\.router\.weight"),
    Expected(mutations.norms_not_reduced, r".*norm\.weight"),
    Expected(mutations.repeated_heads_not_reduced, r"layers\.\d\.attention\.w[kv]\.weight"),
    Expected(mutations.experts_times_tp, r"layers\.\d\.moe\.experts\.w_(up|down)", ratio=2.0),
    Expected(mutations.experts_over_tp, r"layers\.\d\.moe\.experts\.w_(up|down)", ratio=0.5),
    Expected(mutations.norm_counts_replicas, "grad_norm", "grad_norm"),
    Expected(mutations.norm_of_own_stage, "grad_norm", "grad_norm", layout=PP2),
    # Nothing but the loss is above a last router, so its gradient is exactly four times too large.
    Expected(
        mutations.router_term_per_microbatch,
        r"layers\.1\.moe\.router\.weight",
        ratio=4.0,
        changes={"moe.layers": (1,)},
    ),
    Expected(mutations.gates_detached, r"layers\.\d\.moe\.router\.weight", ratio=0.0),
    Expected(mutations.second_ranks_experts_stale, r"layers\.\d\.moe\.experts\.w_(up|down)", "update"),
    Expected(mutations.pipeline_scales_gradients, ".*", ratio=0.25, layout=PP2),
    Expected(mutations.routing_over_own_tokens, r"layers\.0\.moe\..*", "routing"),
    Expected(
        mutations.norms_decayed,
        r".*(norm|router|tok_embeddings)\.weight",
        "update",
        changes={"optimizer.lr": 0.1, "lr_scheduler.warmup_steps": 0},
    ),
]
# Of the size of the cross-entropy, so that the gradient that has most of it is the router's.
BALANCE = {"moe.router": "topk", "moe.balance_loss": 1.0, "moe.layers": (1,)}
WHOLE = {"mesh.sequence_parallel": False}
ROUTER = r"layers\.1\.moe\.router\.weight"
MUTATIONS += [
    Expected(mutations_balance.loss_per_microbatch, ROUTER, changes=BALANCE),
    Expected(mutations_balance.loss_of_every_tp_rank, ROUTER, changes=BALANCE | WHOLE),
    Expected(
        mutations_balance.loss_again_when_recomputed,
        ROUTER,
        changes=BALANCE | {"activation_checkpoint.mode": "full"},
    ),
    Expected(mutations_balance.bias_by_own_counts, r".*\.bias", "state", layout=DP2, changes={"moe.bias_rate": 0.1}),
    Expected(
        mutations_balance.capacity_of_own_tokens, r".*\.dropped", "statistic", changes={"moe.capacity_factor": 1.0}
    ),
    Expected(
        mutations_balance.normalization_detached,
        ROUTER,
        changes={"moe.normalize_gates": True, "moe.layers": (1,)},
    ),
    Expected(
        mutations_balance.batch_loss_of_the_microbatch,
        r".*\.balance_loss",
        "statistic",
        changes={"moe.balance_loss": 0.1, "moe.balance_over": "batch"},
    ),
    Expected(
        mutations_balance.bias_in_the_gate,
        r".*\.router_gate_norm",
        "statistic",
        changes={"moe.bias_rate": 0.1},
    ),
    Expected(
        mutations_balance.bias_only_where_it_moves,
        r".*\.load",
        "routing",
        changes={"moe.router": "topk", "moe.selection_bias": True},
    ),
    Expected(
        mutations_balance.noise_of_the_batch,
        ".*",
        "routing",
        layout=DP2,
        changes={"moe.router": "topk", "moe.jitter": 0.5},
    ),
]
LATENT = {"model.num_kv_heads": 0, "model.kv_rank": 10, "model.nope_dim": 6, "model.rope_dim": 4, "model.v_dim": 5}
DENSE = {"moe.num_experts": 0}
MUTATIONS += [
    Expected(
        mutations_attention.latent_not_summed,
        r"layers\.\d\.attention\.w(q|kv)_a\.weight",
        changes=LATENT | {"model.q_rank": 14},
    ),
    Expected(
        mutations_attention.output_bias_of_every_rank,
        r"layers\.0\.attention\.output_bias",
        changes=DENSE | {"model.attention_bias": "all", "model.num_layers": 1},
    ),
    Expected(
        mutations_attention.ffn_bias_of_every_rank,
        ".*",
        changes={"model.ffn_bias": True, "moe.num_experts": 0},
    ),
    Expected(
        mutations_attention.sink_without_gradient,
        r"layers\.\d\.attention\.sinks",
        ratio=0.0,
        changes={"model.sinks": True},
    ),
    Expected(
        mutations_attention.window_off_by_one,
        r"layers\.0\.attention\.w[qk]\.weight",
        changes=DENSE | {"model.window": 3, "model.num_layers": 1},
    ),
]


def verdict_on(layout: Layout, **changes: Any) -> Verdict:
    (verdict,) = prove([Case(layout, override(CONFIG, changes))])
    return verdict


@pytest.mark.parametrize("layout", [TP2, DP2, PP2], ids=lambda layout: layout.mesh)
def test_the_unbroken_library_passes(layout: Layout) -> None:
    assert verdict_on(layout).ok


@pytest.mark.parametrize("expected", MUTATIONS, ids=lambda expected: expected.mutation.__name__)
def test_caught_and_named(expected: Expected) -> None:
    with expected.mutation():
        verdict = verdict_on(expected.layout, **expected.changes)
    assert not verdict.ok
    assert not verdict.failure
    worst = verdict.worst
    assert re.fullmatch(expected.worst, worst.name), worst
    assert worst.kind == expected.kind, worst
    if expected.ratio is not None:
        assert worst.ratio == pytest.approx(expected.ratio, rel=1e-6)


@pytest.mark.parametrize(
    "mutation",
    [mutations.microbatch_dropped, mutations.loss_over_own_targets, mutations.padding_in_the_softmax],
)
def test_what_is_wrong_with_all_gradients_alike_is_said_of_all(mutation: mutations.Mutation) -> None:
    with mutation():
        verdict = verdict_on(DP2)
    assert not verdict.failure
    wrong = {d.name for d in verdict.deviations if d.kind == "gradient" and not d.ok}
    assert wrong == {d.name for d in verdict.deviations if d.kind == "gradient"}
    assert any(d.kind == "loss" and not d.ok for d in verdict.deviations)


def test_only_what_is_broken_is_named() -> None:
    with mutations.experts_times_tp():
        verdict = verdict_on(TP2)
    wrong = {d.name for d in verdict.deviations if d.kind == "gradient" and not d.ok}
    assert wrong == {f"layers.{i}.moe.experts.w_{w}" for i in range(2) for w in ("up", "down")}
