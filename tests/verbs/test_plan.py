"""`plan`: arithmetic that must agree with the table, the counts, and what was measured."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dtensor.config.load import build, load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.estimate import saved_tensors
from moe_dtensor.estimate.dispatch import LATENCY, READ, choose_dispatch, dispatch_costs
from moe_dtensor.estimate.memory import fullest_rank, in_flight, rank_memory
from moe_dtensor.estimate.shards import all_shards, flops_per_token, fold, parameters
from moe_dtensor.estimate.sizes import allocated_rows, distinct_ranks, expert_rows, tokens_at_experts
from moe_dtensor.estimate.speed import SOURCES, bubble
from moe_dtensor.estimate.traffic import traffic
from moe_dtensor.verbs import plan

RESULTS = Path("docs/results")
MEASURED = [
    ("olmoe_small", None, None),
    ("neox_125m_dmoe", None, None),
    ("debug", None, None),
    ("olmoe_small", 8, 38.7),
    ("neox_125m_dmoe", 8, 14.2),
    ("neox_125m_dmoe", 16, 18.6),
]
"""(result of ``bench train``, sequences in a forward and GiB from docs/log.md where it has no file of its own; weights
were freed after each forward then)."""


def preset(name: str, mesh: str, **keys: Any) -> Config:
    """A resolved preset on a mesh."""
    dp, pp, tp = map(int, mesh.split("x"))
    overrides = {key.replace("__", "."): value for key, value in keys.items()}
    config = plan.with_vocabulary(override(load(f"train_configs/{name}.toml"), overrides))
    return resolve(replace(config, mesh=replace(config.mesh, dp=dp, pp=pp, tp=tp)), dp * pp * tp)


@pytest.mark.parametrize(("name", "size", "gib"), MEASURED)
def test_memory_is_what_was_measured(name: str, size: int | None, gib: float | None) -> None:
    record = json.loads((RESULTS / f"h100_train_{name}.json").read_text())
    tables = record["config"]
    if size:
        tables["training"]["microbatch_size"] = tables["moe"]["group_sequences"] = size
        tables["fsdp"]["reshard_after_forward"] = "always"
    memory = rank_memory(resolve(build(tables), record["ranks"]), 0)
    assert memory.peak / 2**30 == pytest.approx(gib or record["result"]["peak_memory_gib"], rel=0.04)


def test_memory_of_windows_and_latents_is_what_was_measured() -> None:
    """One H200: a window, a window in every other block with sinks and an output gate, latent attention."""
    records = json.loads((RESULTS / "h200_train_olmoe_small_attention.json").read_text())["variants"]
    assert [record["name"] for record in records] == ["window", "window_sinks_gate", "latent"]
    for record in records:
        peak = rank_memory(resolve(build(record["config"]), record["ranks"]), 0).peak / 2**30
        assert peak == pytest.approx(record["result"]["peak_memory_gib"], rel=0.02), record["name"]


def test_memory_of_two_gpus_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fullest rank, under every placement, dispatch and schedule that was run, when norm and rotation of heads
    had no kernels yet, and tp split positions always."""
    monkeypatch.setattr(saved_tensors, "has_kernel", lambda *_: False)
    monkeypatch.setattr(saved_tensors, "tp_axis", lambda config: 1 if config.mesh.tp > 1 else None)
    records = json.loads((RESULTS / "h100x2_train_olmoe_small.json").read_text())["variants"]
    assert len(records) > 10
    for record in records:
        memory = plan.make_plan(resolve(build(record["config"]), record["ranks"]), record["ranks"]).balanced[1]
        assert memory.peak / 2**30 == pytest.approx(record["result"]["peak_memory_gib"], rel=0.06), record["name"]


@pytest.mark.parametrize("name", ["h200_train_olmoe_small_fused_again", "h200x2_train_olmoe_small_tp"])
def test_memory_of_the_newest_runs_is_what_was_measured(name: str) -> None:
    """QuACK and FlashAttention 4, whose packages are not needed here, float8; tp by heads and by sequences."""
    records = json.loads((RESULTS / f"{name}.json").read_text())["variants"]
    assert len(records) >= 4
    for record in records:
        memory = plan.make_plan(resolve(build(record["config"]), record["ranks"]), record["ranks"]).balanced[1]
        assert memory.peak / 2**30 == pytest.approx(record["result"]["peak_memory_gib"], rel=0.01), record["name"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("olmoe_small", {}),
        ("qwen3_30b_a3b", {}),
        ("neox_125m_dmoe", {}),
        ("debug", {"moe__every": 2, "moe__num_shared_experts": 1, "model__tie_embeddings": True}),
        ("debug", {"moe__num_experts": 0, "model__activation": "gelu", "model__qk_norm": "head"}),
    ],
)
def test_parameters_add_up_to_the_count(name: str, keys: dict[str, Any]) -> None:
    config = preset(name, "1x1x1", **keys)
    assert sum(folded.count * folded.shard.size for folded in fold(all_shards(config))) == parameters(config)[0]
    assert all(shard.local == shard.shape for shard in all_shards(config))


@pytest.mark.parametrize("place", ["tp", "dp", "tp_hidden", "dp_tp"])
@pytest.mark.parametrize("mesh", ["8x2x8", "4x2x4", "2x1x2"])
def test_local_shapes_times_ranks_are_the_whole(mesh: str, place: str) -> None:
    config = preset("qwen3_30b_a3b", mesh, mesh__experts=place)
    for shard in all_shards(config):
        ranks = config.mesh.dp * (1 if shard.row.tp is None else config.mesh.tp)
        assert math.prod(shard.local) * ranks == shard.size, shard.name
        assert shard.used_size == shard.local_size * (config.mesh.dp if shard.row.fsdp else 1), shard.name


def test_stages_have_each_parameter_once() -> None:
    names = [shard.name for shard in all_shards(preset("debug", "1x3x2", pipeline__schedule="ZBVZeroBubble"))]
    assert len(names) == len(set(names))
    assert {"tok_embeddings.weight", "layers.5.moe.router.weight", "output.weight"} <= set(names)


def test_skew_takes_more_rows_only_where_experts_are_split() -> None:
    split, whole = preset("qwen3_30b_a3b", "8x2x8"), preset("olmoe_small", "1x1x1")
    assert expert_rows(split, skewed=False) == 4096 * 8 // 8
    assert expert_rows(split, skewed=True) == 4096 * 8
    assert expert_rows(whole, skewed=False) == expert_rows(whole, skewed=True) == 16 * 2048 * 8
    assert fullest_rank(split, skewed=True)[1].peak > fullest_rank(split)[1].peak
    assert fullest_rank(whole, skewed=True) == fullest_rank(whole)


# Qwen3 30B on 8x2x8: T = 4096 tokens, K = 8 of E = 128 experts; a tp rank's slice has 512.
TOGETHER = [
    ("tp", "all_gather", 4096, 4096, 32768, 32768),
    ("tp_hidden", "all_gather", 4096, 32768, 32768, 32768),
    ("dp", "all_gather", 512 * 8, 4096, 4096 * 8, 4096 * 8),
    ("dp_tp", "all_gather", 4096 * 8, 4096, 32768 * 2, 32768 * 2),
    ("tp", "all_to_all", 512 * 5.3394, 4096, 32768, None),
    ("dp", "all_to_all", 512 * 5.3394, 4096, 32768, None),
    ("dp_tp", "all_to_all", 512 * 7.7795, 4096, 65536, None),
]
"""(placement, dispatch, vectors at a rank's experts, copies if balanced, at most, room under moe.rows = worst)."""


@pytest.mark.parametrize(("place", "dispatch", "vectors", "balanced", "skewed", "worst"), TOGETHER)
def test_what_comes_together(
    place: str, dispatch: str, vectors: float, balanced: int, skewed: int, worst: int | None
) -> None:
    config = preset("qwen3_30b_a3b", "8x2x8", mesh__experts=place, mesh__dispatch=dispatch)
    assert tokens_at_experts(config, skewed=False) == pytest.approx(vectors, abs=0.5)
    assert (expert_rows(config, skewed=False), expert_rows(config, skewed=True)) == (balanced, skewed)
    assert allocated_rows(config, False, "worst") == (balanced if worst is None else worst)
    assert allocated_rows(config, False, "exact") == balanced
    assert rank_memory(config, 0, skewed=True).peak >= rank_memory(config, 0).peak
    worse = preset("qwen3_30b_a3b", "8x2x8", mesh__experts=place, mesh__dispatch=dispatch, moe__rows="worst")
    alike = rank_memory(worse, 0, skewed=True) == rank_memory(worse, 0)
    assert alike == (dispatch == "all_gather"), "room for the worst case is there whatever the routing"


def test_without_sequence_parallelism_tp_ranks_send_shares() -> None:
    """Of 7 tokens that both tp ranks hold each sends 4, one of them padding; over dp each rank has all of them."""
    for place, vectors in (("dp_tp", 4 * 4), ("dp", 7 * 2), ("tp", 4 * 2)):
        keys = {"training__seq_len": 7, "training__microbatch_size": 1, "mesh__sequence_parallel": False}
        config = preset("debug", "2x1x2", mesh__experts=place, mesh__dispatch="all_to_all", **keys)
        assert tokens_at_experts(config, skewed=True) == vectors


def test_who_chooses_and_who_is_full_limits_the_rows() -> None:
    """debug.toml on 1x1x2: 3 x 128 tokens in one routing group, 2 of 8 experts."""
    tokens = 3 * 128
    chosen = preset("debug", "1x1x2", moe__router="expert_choice")
    assert expert_rows(chosen, skewed=True) == expert_rows(chosen, skewed=False) == 4 * (tokens * 2 // 8)
    assert allocated_rows(chosen, False, "worst") == tokens * 4
    assert allocated_rows(preset("debug", "1x1x1", moe__router="expert_choice"), False) == tokens * 8
    full = preset("debug", "1x1x2", moe__capacity_factor=1.25)
    assert expert_rows(full, skewed=False) == tokens * 2 // 2
    assert expert_rows(full, skewed=True) == 4 * (tokens * 2 // 8) * 1.25
    assert allocated_rows(full, True, "worst") == tokens * 2, "a capacity makes no less room"
    half = preset("debug", "1x1x2", moe__capacity_factor=0.5)
    assert expert_rows(half, skewed=False) == expert_rows(half, skewed=True) == tokens // 2


def _reached(ranks: int, experts: int, choices: list[tuple[int, ...]]) -> float:
    return sum(len({expert * ranks // experts for expert in chosen}) for chosen in choices) / len(choices)


def test_ranks_that_a_token_reaches() -> None:
    """Against all choices written out."""
    config = preset("debug", "1x1x4", moe__top_k=3)
    assert distinct_ranks(config) == pytest.approx(_reached(4, 8, list(itertools.combinations(range(8), 3))))
    for groups, kept, top_k, tp in ((4, 2, 3, 4), (2, 1, 2, 8), (8, 5, 3, 2), (4, 3, 4, 2)):
        keys = {"moe__expert_groups": groups, "moe__expert_groups_kept": kept, "moe__top_k": top_k}
        config = preset("debug", f"1x1x{tp}", **keys)
        choices = []
        for some in itertools.combinations(range(groups), kept):
            allowed = [expert for expert in range(8) if expert * groups // 8 in some]
            choices += itertools.combinations(allowed, top_k)
        assert distinct_ranks(config) == pytest.approx(_reached(tp, 8, choices)), keys


def test_experts_outside_of_fsdp_are_a_share_of_all() -> None:
    """Their copy stays, their gradients are in the dtype of the weights and never whole over dp."""
    config = preset("olmoe_small", "8x1x1", mesh__experts="dp", training__global_batch_size=256)
    experts = sum(shard.size for shard in all_shards(config) if ".experts." in shard.name)
    rest = parameters(config)[0] - experts
    in_fsdp = preset("olmoe_small", "8x1x1", training__global_batch_size=256)
    memory, before = rank_memory(config, 0), rank_memory(in_fsdp, 0)
    assert memory.weights == before.weights
    assert memory.gradients == 4 * (rest + experts // 8) < before.gradients
    assert memory.expert_copy == 2 * experts // 8
    assert memory.compute_copy < before.compute_copy
    float32 = preset("olmoe_small", "8x1x1", mesh__experts="dp", training__param_dtype="float32")
    assert rank_memory(float32, 0).expert_copy == 0


def test_auto_takes_the_cheaper_dispatch() -> None:
    """Few bytes over a slow link against few reads over a fast one."""
    slow, fast = (
        preset("qwen3_30b_a3b", "8x2x8", mesh__dispatch="auto", mesh__link_bandwidth=bandwidth)
        for bandwidth in (25.0, 9000.0)
    )
    assert (choose_dispatch(slow), choose_dispatch(fast)) == ("all_to_all", "all_gather")
    gather, exchange = dispatch_costs(slow).values()
    assert exchange.total < gather.total
    assert gather.seconds == pytest.approx(gather.total / 25e9 + 10 * LATENCY + 2 * READ)
    assert choose_dispatch(preset("qwen3_30b_a3b", "8x2x8", mesh__dispatch="auto", mesh__experts="tp_hidden")) == (
        "all_gather"
    )
    assert choose_dispatch(preset("olmoe_small", "4x1x1", mesh__dispatch="all_to_all")) == "all_gather"


@pytest.mark.parametrize(
    ("compiled", "mode", "gathers", "exchanges"),
    [
        (False, "none", 7, 7),
        (True, "none", 7, 7),
        # Again: vectors, gates and ids; under all-to-all counts and the way back too.
        (False, "selective", 7 + 3, 7 + 4),
        (False, "full", 7 + 3, 7 + 4),
        # As torch's profiler counted them: choices, counts and the way back are not needed again.
        (True, "selective", 7 + 2, 7 + 2),
    ],
)
def test_collectives_of_a_dispatch(compiled: bool, mode: str, gathers: int, exchanges: int) -> None:
    config = preset("debug", "1x1x2", compile__enable=compiled, activation_checkpoint__mode=mode)
    costs = dispatch_costs(config)
    assert (costs["all_gather"].collectives, costs["all_to_all"].collectives) == (gathers, exchanges)
    whole = preset("debug", "2x1x2", mesh__sequence_parallel=False, mesh__experts="dp_tp")
    assert [cost.collectives for cost in dispatch_costs(whole).values()] == [3 + 7, 7 + 3]


def test_the_dispatch_is_told_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    words = ["--config", "train_configs/qwen3_30b_a3b.toml", "--meshes", "8x2x8", "--mesh.experts", "dp_tp"]
    assert plan.main([*words, "--mesh.dispatch", "auto", "--json", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "auto takes all_to_all: 1,268 us less for the bytes and 180 us less for collectives and reads" in text
    assert "all_to_all * 536 us a block and microbatch: 216 for 92.6 MiB sent" in text
    assert "room for 4,096 to 65,536" in text
    assert "dim 0, not FSDP" in text
    (record,) = json.loads(out.read_text())
    costs = record["dispatch"]
    assert set(costs["all_to_all"]["bytes_sent"]) == {"dp_tp"}
    assert costs["all_gather"]["microseconds"] > costs["all_to_all"]["microseconds"]
    assert record["dispatch_in_use"] == record["dispatch_of_auto"] == "all_to_all"
    assert record["expert_rows"]["worst"] == record["expert_rows"]["exact"] == {"balanced": 4096, "skewed": 65536}
    assert record["bytes_sent_per_step"]["dp_tp"] > 0
    assert plan.main(["--config", "train_configs/olmoe_small.toml", "--meshes", "4x1x1"]) == 0
    assert "auto takes" not in capsys.readouterr().out, "nothing is dispatched"


@pytest.mark.parametrize(
    ("rounding", "state", "size"),
    [("nearest", "auto", 8), ("stochastic", "auto", 8), ("remainder", "auto", 10), ("remainder", "float32", 14)],
)
def test_bytes_of_a_weight_in_bfloat16(rounding: str, state: str, size: int) -> None:
    """Weight, gradient, moments and what is kept of its low bits."""
    narrow = {"training__dtype": "bfloat16", "optimizer__rounding": rounding, "optimizer__state_dtype": state}
    config = preset("olmoe_small", "4x1x1", training__global_batch_size=64, **narrow)
    memory = rank_memory(config, 0)
    assert memory.weights + memory.gradients + memory.moments == size * parameters(config)[0] // 4


def test_gradients_are_whole_while_microbatches_accumulate() -> None:
    four, one = (rank_memory(preset("olmoe_small", "4x1x1", training__global_batch_size=b), 0) for b in (256, 64))
    assert four.gradients == 4 * parameters(preset("olmoe_small", "4x1x1"))[0]
    assert one.gradients == one.weights == four.gradients // 4


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("GPipe", 3 / 19),
        ("1F1B", 3 / 19),
        ("Interleaved1F1B", 3 / 35),
        ("InterleavedZeroBubble", 3 / 99),
        ("ZBVZeroBubble", 0),
        ("DualPipeV", 3 / 51),
    ],
)
def test_bubbles(schedule: str, share: float) -> None:
    """p = 4, m = 16, v = 2."""
    config = preset("qwen3_30b_a3b", "8x4x1", pipeline__schedule=schedule)
    assert bubble(config) == pytest.approx(share)
    assert schedule in SOURCES
    for pp_rank in range(4):
        assert all(1 <= count <= 16 for count in in_flight(config, pp_rank).values())


def test_1f1b_keeps_one_microbatch_for_each_stage_ahead() -> None:
    config = preset("qwen3_30b_a3b", "8x4x1", pipeline__schedule="1F1B")
    assert [in_flight(config, rank) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]


def test_bytes_sent() -> None:
    assert vars(traffic(preset("olmoe_small", "1x1x1"))) == {"dp": 0, "pp": 0, "tp": 0, "dp_tp": 0}
    config = preset("olmoe_small", "4x1x1")  # one microbatch: two gathers in bf16, one reduction in float32
    assert traffic(config).dp == parameters(config)[0] * (2 * 2 + 4) * 3 // 4
    config = preset("debug", "1x2x1", pipeline__schedule="1F1B")  # 8 microbatches of 3 x 128 tokens in float32
    assert traffic(config).pp == 8 * 3 * 128 * 128 * 4
    config = preset("debug", "1x2x1", pipeline__schedule="ZBVZeroBubble")  # the turn of the V stays on its rank
    assert traffic(config).pp == 2 * 8 * 3 * 128 * 128 * 4
    split, more = (traffic(preset("debug", f"1x1x{tp}")).tp for tp in (2, 8))
    assert split / (1 / 2) == pytest.approx(more / (7 / 8), rel=1e-3)
    # In 16 blocks and 4 microbatches, half of it to the other rank: tokens in and out, forward and back, with sums of
    # squares; or four weights of 1024 x 1024 and two of norms, in bfloat16 and gradients in float32.
    heads, own = (traffic(preset("olmoe_small", "1x1x2", mesh__attention=way)).tp for way in ("heads", "sequences"))
    tokens, weights = 16 * 2048, 4 * 1024 * 1024 + 2 * 1024
    assert heads - own == 4 * 16 * (tokens * (4 * 1024 * 2 + 2 * 2 * 2 * 4) - weights * (2 + 4)) // 2


def test_a_mesh_that_cannot_run_is_refused_beside_one_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "plan.json"
    words = ["--config", "train_configs/debug.toml", "--meshes", "2x2x2", "1x1x3", "--json", str(out)]
    assert plan.main(words) == 2
    text = capsys.readouterr().out
    assert "1x1x3 cannot run: model.num_heads = 8 is not a multiple of mesh.tp = 3" in text
    assert "layers.*.moe.experts.w_up" in text
    assert "bubble" in text
    done, refused = json.loads(out.read_text())
    assert refused["mesh"] == "1x1x3"
    assert "Set mesh.tp to a divisor of 8" in refused["refused"]
    config = preset("debug", "2x2x2")
    assert done["flops_per_step"] == flops_per_token(config) * 24 * 128
    assert sum(row["count"] * math.prod(row["shape"]) for row in done["parameters"]) == done["total_parameters"]
    rank, memory = fullest_rank(config)
    assert done["memory_bytes"]["balanced"]["peak"] == memory.peak
    assert done["memory_bytes"]["balanced"]["pipeline_rank"] == rank


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--meshes", "2x2"], "--meshes 2x2: not a mesh"),
        (["--data.tokenizer", "tokenizer.json"], "which plan does not load"),
    ],
)
def test_what_plan_cannot_know(words: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        plan.main(["--config", "train_configs/debug.toml", *words])


def test_world_comes_from_ngpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NGPU", "8")
    assert plan.main(["--config", "train_configs/debug.toml", "--mesh.tp", "2"]) == 0
    assert "dp=4 x pp=1 x tp=2" in capsys.readouterr().out


def test_it_loads_no_torch() -> None:
    script = (
        "import sys; from moe_dtensor.__main__ import main\n"
        "code = main(['plan', '--config', 'train_configs/qwen3_30b_a3b.toml', '--meshes', '8x2x8'])\n"
        "sys.exit(code or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
