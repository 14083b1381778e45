"""Each wrong config or command line gets one clear error: key, value, remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_dtensor.__main__ import main
from moe_dtensor.config.check import ABOVE_ZERO, AT_LEAST_ONE, BY_ITSELF, FROM_ZERO_TO_ONE
from moe_dtensor.config.tables import all_fields

from .wrong_computing import COMPUTING
from .wrong_places import PLACES

PLAIN = "tests/config/plain.toml"

# (command line after `check --config plain.toml`, words that the error's first line has, words of its remedy)
WRONG = [
    # Command line, keys, types, choices.
    ("--training.stps 5", "training.stps: no such key", "Did you mean training.steps?"),
    ("--modle.dim 64", "[modle]: no such table", "Did you mean [model]?"),
    ("--model.num_experts 4", "model.num_experts: no such key", "Did you mean moe.num_experts?"),
    ("--steps 5", "unrecognized arguments: --steps", "--training.steps"),
    ("--model.rope_theta 1", "model.rope_theta = 1.0: no pair of dimensions turns slower", "Set it above 1"),
    ("--model.dim", "--model.dim has no value", "VALUE"),
    ("--model.dim wide", 'model.dim = "wide" has the wrong type', "an integer, such as 256"),
    ("--model.dim 64.5", 'model.dim = "64.5" has the wrong type', "an integer"),
    ("--optimizer.lr nan", "optimizer.lr = nan has the wrong type", "a number"),
    ("--optimizer.lr inf", "optimizer.lr = inf is not finite", "finite"),
    ("--compile.enable maybe", 'compile.enable = "maybe" has the wrong type', "true | false"),
    ("--moe.layers 1,x", 'moe.layers = "1,x" has the wrong type', "a list of integers"),
    ("--pipeline.schedule 1f1b", 'pipeline.schedule = "1f1b" is not among its choices', 'Did you mean "1F1B"?'),
    ("--moe.router sinkhornn", 'moe.router = "sinkhornn" is unknown', 'Did you mean "sinkhorn"?'),
    ("--data.corpus mine.corpus", 'data.corpus = "mine.corpus" is unknown', "package.module:Name"),
    ("--training.loss hinge", 'training.loss = "hinge" is unknown', "cross_entropy"),
    ("--data.path texts", 'data.path = "texts", but data.corpus = "stdlib" reads no path', "Set data.corpus"),
    ("--lr_scheduler.warmup_steps 50 --training.steps 9", "warmup_steps = 50 is above training.steps = 9", "9 or less"),
    ("--profiling.enable true --training.steps 9", "first_step = 10 is above training.steps = 9", "9 or less"),
    ("--training.seed 9223372036854775808", "training.seed = 9223372036854775808 is too large", "below 2^63"),
    ("--data.corpus files --data.path /none", "'/none' matches no file", "files that exist"),
    (
        "--data.corpus tokens --data.path /none.bin",
        "token files; '/none.bin' matches no file",
        "docs/data.md",
    ),
    ("--data.corpus conversations", 'data.corpus = "conversations" needs data.path', "Set data.path"),
    ("--data.chat_template /none.jinja", "data.chat_template: there is no file '/none.jinja'", "Jinja"),
    ("--optimizer.router_lr -1", "optimizer.router_lr = -1.0 is too small", "0 or more"),
    (
        "--moe.num_experts 0 --training.routing_drift_interval 5",
        "routing_drift_interval = 5, but no block has experts",
        "= 0",
    ),
    ("--data.tokenizer /none", "there is no file '/none'", "bytes"),
    ("--run.folder /dev/null/run", "run.folder = '/dev/null/run' cannot be used", "can be written"),
    ("--data.corpus files", 'data.corpus = "files" needs data.path', "Set data.path"),
    # One field by itself.
    ("--training.steps 0", "training.steps = 0 is too small", "1 or more"),
    ("--mesh.dp 0", "mesh.dp = 0 is no number of ranks", "-1"),
    ("--optimizer.beta2 1.0", "optimizer.beta2 = 1.0", "below 1"),
    ("--optimizer.eps 0", "optimizer.eps = 0.0 must be above 0", "1e-08"),
    ("--lr_scheduler.min_lr_ratio 1.5", "lr_scheduler.min_lr_ratio = 1.5 lies outside", "0 to 1"),
    ("--checkpoint.keep_last 1", "checkpoint.keep_last = 1", "2 or more"),
    ("--training.norm_type 1", "training.norm_type = 1.0 is not supported", "2 or inf"),
    # The model.
    ("--model.dim 100", "model.dim = 100 is not a multiple of model.num_heads = 8", "model.head_dim"),
    ("--model.head_dim 15", "model.head_dim = 15 is odd", "model.head_dim = 16"),
    ("--moe.top_k 1,99", "moe.top_k = 99 is above moe.num_experts", "at most"),
    ("--moe.top_k 0,2", "moe.top_k_by_layer has 0", "1 or more"),
    ("--moe.router topk,sinkhornn", 'moe.router = "sinkhornn" is unknown', 'Did you mean "sinkhorn"?'),
    ("--moe.top_k 1,2 --moe.router topk --moe.normalize_gates true", "with moe.top_k = 1: the one gate", "2 or more"),
    ("--model.norm_bias true", "model.norm_bias = true with model.norm = rmsnorm", "model.norm = layernorm"),
    ("--model.head_bias true --model.tie_embeddings true", "the embedding is the head", "Take one"),
    ("--model.rotary_dim 64", "model.rotary_dim = 64 is above model.head_dim = 24", "at most 24"),
    ("--model.v_dim 16", "model.v_dim is for latent attention", "model.kv_rank"),
    ("--model.kv_rank 16", "model.kv_rank = 16 needs model.nope_dim", "model.nope_dim"),
    (
        "--model.kv_rank 16 --model.nope_dim 8 --model.rope_dim 4 --model.v_dim 8 --model.qk_norm head",
        "model.qk_norm = head with model.kv_rank",
        "model.qk_norm = none",
    ),
    ("--model.window_layers window,full", "model.window_layers", "model.window"),
    ("--model.window 8 --model.window_layers window,some", "is not among its choices", "window"),
    ("--rope.factor 2", "rope.factor = 2.0 with rope.scaling = none", "rope.scaling"),
    ("--rope.scaling yarn --rope.factor 2", "needs rope.original_length", "longest context"),
    (
        "--rope.scaling longrope --rope.original_length 1 --rope.factor 2 --rope.short_factors 1 --rope.long_factors 1",
        "rope.original_length = 1 with rope.scaling = longrope",
        "rope.attention_factor",
    ),
    ("--rope.scaling longrope --rope.original_length 8", "rope.short_factors has 0 factors", "12 numbers"),
    ("--model.num_kv_heads 3", "model.num_heads = 8 is not a multiple of model.num_kv_heads = 3", "divisor of 8"),
    ("--moe.top_k 9", "moe.top_k = 9 is above moe.num_experts = 8", "at most 8"),
    ("--moe.layers 0,6", "moe.layers names block 6", "raise model.num_layers"),
    ("--moe.layers 1,1", "moe.layers = [1, 1] names a block twice", "once"),
    ("--moe.every 7", "moe.every = 7 makes no MoE block", "at most 6"),
    ("--moe.num_experts 0 --moe.layers 1", "moe.layers = [1] with moe.num_experts = 0", "clear moe.layers"),
    (
        "--training.microbatch_size 4 --moe.group_sequences 3",
        "moe.group_sequences = 3 does not divide training.microbatch_size = 4",
        "divisor",
    ),
    # Routing.
    ("--moe.normalize_gates true --moe.top_k 1", "normalize_gates = true with moe.top_k = 1", "2 or more"),
    ("--moe.score_before_top_k false --moe.top_k 1 --moe.score softmax", "the one gate is always 1", "2 or more"),
    ("--moe.expert_groups_kept 2", "moe.expert_groups_kept = 2 without moe.expert_groups", "Set moe.expert_groups"),
    ("--moe.expert_groups 3 --moe.expert_groups_kept 1", "not a multiple of moe.expert_groups = 3", "divisor of 8"),
    ("--moe.expert_groups 4", "moe.expert_groups_kept = 0 of moe.expert_groups = 4", "from 1 to 4"),
    (
        "--moe.expert_groups 4 --moe.expert_groups_kept 5",
        "moe.expert_groups_kept = 5 of moe.expert_groups = 4",
        "1 to 4",
    ),
    (
        "--moe.expert_groups 4 --moe.expert_groups_kept 1 --moe.top_k 3",
        "moe.top_k = 3 is above the 2 experts of moe.expert_groups_kept = 1 groups",
        "Keep more groups",
    ),
    (
        "--moe.expert_groups 4 --moe.expert_groups_kept 1 --moe.router hash",
        "moe.expert_groups = 4 limits the choice of tokens",
        "choose sinkhorn or topk",
    ),
    (
        "--moe.router expert_choice --moe.capacity_factor 1.5",
        "gives every expert the same load",
        "moe.capacity_factor out",
    ),
    ("--moe.router expert_choice --moe.bias_rate 0.001", "gives every expert the same load", "moe.bias_rate out"),
    ("--moe.router expert_choice --moe.normalize_gates true", "any number of experts", "moe.normalize_gates out"),
    ("--moe.router expert_choice --moe.score_before_top_k false", "chooses by scores", "moe.score_before_top_k out"),
    ("--moe.router uniform --moe.bias_rate 0.001", "looks at no bias", "moe.bias_rate out"),
    ("--moe.router hash --moe.selection_bias true", "looks at no bias", "moe.selection_bias out"),
    ("--moe.router expert_choice --moe.selection_bias true", "lets experts choose", "moe.selection_bias out"),
    ("--moe.jitter 1", "moe.jitter = 1.0 could hide the router's input altogether", "below 1"),
    ("--moe.jitter -0.1", "moe.jitter = -0.1 lies outside 0 to 1", "0 to 1"),
    ("--moe.gate_scale 0", "moe.gate_scale = 0.0 must be above 0", "1.0"),
    ("--rope.high -1", "rope.high = -1.0 is too small", "0 or more"),
    ("--moe.balance_loss -1", "moe.balance_loss = -1.0 is too small", "0 or more"),
    ("--moe.capacity_factor -1", "moe.capacity_factor = -1.0 is too small", "0 or more"),
    # The mesh.
    ("--mesh.dp 2 --mesh.tp 4 --world 4", "dp=2 x pp=1 x tp=4 = 8 ranks, but there are 4", "mesh.dp = -1"),
    ("--mesh.tp 4 --world 6", "a multiple of pp=1 x tp=4 = 4 ranks, but there are 6", "Start 8 ranks"),
    ("--mesh.tp 3", "model.num_heads = 8 is not a multiple of mesh.tp = 3", "divisor of 8"),
    ("--mesh.tp 4 --moe.num_experts 6", "moe.num_experts = 6 is not a multiple of mesh.tp = 4", "that to 8"),
    (
        "--mesh.tp 4 --training.seq_len 126",
        "training.seq_len = 126 is not a multiple",
        "mesh.sequence_parallel = false",
    ),
    ("--mesh.tp 8 --moe.every 2 --model.hidden_dim 100", "model.hidden_dim = 100 is not a multiple", "104"),
    ("--mesh.tp 8 --moe.num_shared_experts 1 --moe.hidden_dim 12", "moe.hidden_dim = 12 is not a multiple", "16"),
    (
        "--mesh.tp 4 --model.num_heads 12 --model.num_kv_heads 6",
        "model.num_kv_heads = 6 and mesh.tp = 4: neither divides the other",
        "multiple of the other",
    ),
    ("--mesh.dp 12 --model.dim 208", "model.dim = 208 is not a multiple of mesh.dp = 12", "model.dim = 216"),
    (
        "--mesh.dp 12 --model.dim 208 --mesh.experts dp --moe.num_experts 24",
        "model.dim = 208 is not a multiple of mesh.dp = 12",
        "model.dim = 216",
    ),
    ("--mesh.dp 12 --model.dim 208 --moe.num_experts 0", "model.dim = 208 is not a multiple of mesh.dp = 12", "216"),
    *PLACES,
    # Batches.
    (
        "--mesh.dp 2 --mesh.experts dp --mesh.lent_experts 2 --mesh.dispatch auto",
        "mesh.lent_experts = 2 needs all choices on every rank, but mesh.dispatch = auto",
        "mesh.dispatch to all_gather",
    ),
    (
        "--mesh.tp 2 --mesh.experts tp_hidden --mesh.lent_experts 2",
        "mesh.lent_experts = 2 needs whole experts, but mesh.experts = tp_hidden",
        "tp, dp or dp_tp",
    ),
    (
        "--mesh.dp 4 --mesh.experts dp --mesh.lent_experts 3",
        "mesh.lent_experts = 3 is above the 2 experts of a rank (moe.num_experts = 8 over 4 ranks)",
        "at most 2",
    ),
    ("--mesh.lent_experts -1", "mesh.lent_experts = -1 is too small", "0 or more"),
    ("--mesh.dp 4 --mesh.dp_replicate 3", "mesh.dp_replicate = 3 does not divide mesh.dp = 4", "a divisor of 4"),
    ("--mesh.dp 4 --mesh.dp_replicate 8", "mesh.dp_replicate = 8 does not divide mesh.dp = 4", "a divisor of 4"),
    ("--mesh.dp 4 --mesh.expert_ranks 2", "mesh.expert_ranks = 2 is about experts on dp ranks", "dp or dp_tp"),
    (
        "--mesh.dp 4 --mesh.expert_weights sharded",
        "mesh.expert_weights = sharded is about experts on dp ranks, but mesh.experts = tp",
        "take mesh.expert_weights out",
    ),
    (
        "--mesh.dp 4 --mesh.experts dp --mesh.expert_ranks 3",
        "mesh.expert_ranks = 3 does not divide mesh.dp = 4",
        "a divisor of 4",
    ),
    (
        "--mesh.dp 4 --mesh.experts dp --mesh.expert_ranks 4 --mesh.expert_weights sharded --mesh.dp_replicate 2",
        "mesh.dp_replicate = 2, which does not divide the 1 groups of mesh.expert_ranks = 4",
        "a divisor of 2, or mesh.expert_weights = replicated",
    ),
    (
        "--training.dtype bfloat16 --training.param_dtype bfloat16 --fsdp.accumulate sharded",
        "fsdp.accumulate = sharded adds shards up in training.dtype = bfloat16, which is narrower",
        "accumulate = whole",
    ),
    ("--mesh.dp 5 --model.dim 160", "training.global_batch_size = 24 is not a multiple of mesh.dp = 5", "25"),
    (
        "--training.validation_interval 5 --training.validation_sequences 25",
        "training.validation_sequences = 25 is not a multiple of training.global_batch_size = 24",
        "48",
    ),
    # The pipeline.
    ("--mesh.pp 7", "model.num_layers = 6 is below the 7 stages", "7 or more"),
    ("--mesh.pp 4 --pipeline.schedule ZBVZeroBubble", "model.num_layers = 6 is below the 8 stages", "mesh.pp"),
    ("--mesh.pp 2 --model.tie_embeddings true", "model.tie_embeddings = true with mesh.pp = 2", "mesh.pp = 1"),
    (
        "--mesh.pp 2 --compile.enable true --pipeline.schedule DualPipeV",
        "compile.enable = true with pipeline.schedule = DualPipeV",
        "Interleaved1F1B",
    ),
    (
        "--mesh.pp 2 --activation_checkpoint.mode selective --pipeline.schedule InterleavedZeroBubble",
        "activation_checkpoint.mode = selective with pipeline.schedule = InterleavedZeroBubble",
        "full or none",
    ),
    *COMPUTING,
    ("--mesh.pp 2 --fsdp.reshard_after_forward always", "fsdp.reshard_after_forward = always", "auto or never"),
    ("--mesh.pp 3 --training.microbatch_size 12", "runs 2 microbatches", "To have 3 or more"),
    (
        "--mesh.pp 3 --pipeline.schedule DualPipeV --training.microbatch_size 8",
        "needs one for each of 6 stages",
        "To have 6 or more",
    ),
    (
        "--mesh.pp 3 --pipeline.schedule Interleaved1F1B --training.global_batch_size 10",
        "goes in rounds of mesh.pp = 3",
        "multiple of 3",
    ),
    ("--mesh.pp 2 --pipeline.stages_per_rank 2", "pipeline.schedule = 1F1B has 1 on a rank", "stages_per_rank = 0"),
    (
        "--mesh.pp 2 --pipeline.stages_per_rank 1 --pipeline.schedule Interleaved1F1B",
        "wants several stages on a rank, not 1",
        "2 or more",
    ),
    # Precision.
    ("--training.param_dtype float16", "training.param_dtype = float16 needs loss scaling", "bfloat16"),
    ("--training.param_dtype float64", "training.param_dtype = float64 is wider", "training.dtype = float64"),
    ("--rope.attention_factor 0.5", "rope.attention_factor = 0.5 with rope.scaling = none", "rope.scaling"),
    ("--training.dtype float16 --training.param_dtype bfloat16", "training.dtype = float16", "float32"),
    (
        "--training.param_dtype bfloat16 --training.reduce_dtype float16",
        "training.reduce_dtype = float16 holds",
        "float32",
    ),
    (
        "--training.dtype bfloat16 --training.param_dtype bfloat16 --mesh.dp 2 --mesh.experts dp "
        "--training.microbatch_size 6",
        "mesh.experts = dp adds gradients of 2 microbatches up in training.dtype = bfloat16",
        "mesh.experts = tp",
    ),
    (
        "--optimizer.rounding stochastic",
        "optimizer.rounding = stochastic is for weights in bfloat16, not training.dtype = float32",
        "training.dtype = bfloat16, or optimizer.rounding = nearest",
    ),
    ("--training.reduce_dtype bfloat16", "training.reduce_dtype = bfloat16 is narrower", "float32"),
    ("--moe.backend grouped_gemm", "moe.backend = grouped_gemm computes in bfloat16", "reference"),
    ("--moe.backend quack", "moe.backend = quack computes in bfloat16", "reference"),
    (
        "--moe.backend quack --training.param_dtype bfloat16",
        "moe.backend = quack needs the package quack-kernels, which is not installed",
        "moe_dtensor[quack]",
    ),
    (
        "--moe.backend quack --training.param_dtype bfloat16 --moe.keep_rows true",
        "moe.keep_rows = true with moe.backend = quack",
        "Set moe.keep_rows = false",
    ),
    (
        "--moe.backend quack --training.param_dtype bfloat16 --moe.expert_dtype float8",
        "moe.expert_dtype = float8 has no kernel in moe.backend = quack",
        "moe.backend = auto",
    ),
    (
        "--moe.backend triton --training.dtype float64 --training.param_dtype float64 --training.reduce_dtype float64",
        "moe.backend = triton has no kernel for training.param_dtype = float64",
        "reference",
    ),
]


@pytest.mark.parametrize(("words", "problem", "remedy"), WRONG, ids=[row[0] for row in WRONG])
def test_one_clear_error(
    words: str, problem: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["check", "--config", PLAIN, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    rule, hint = err.splitlines()
    assert rule.startswith("error: ")
    assert problem in rule
    assert remedy in hint


def test_another_package_of_flash_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 has the same name."""
    words = f"check --config {PLAIN} --model.attention_backend fa4 --training.param_dtype bfloat16".split()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('loaded')")
    assert main(words) == 2
    rule, hint = capsys.readouterr().err.splitlines()
    assert "needs the package flash-attn-4, which is not installed" in rule
    assert "moe_dtensor[fa4]" in hint
    (folder / "cute").mkdir()
    (folder / "cute" / "interface.py").touch()
    assert main(words) == 0


TOMLS = [
    ("steps = 5\n", "steps = 5 stands outside any table", "training.steps"),
    ("[training]\nsteps = true\n", "training.steps = true has the wrong type", "an integer"),
    ('[training]\nsteps = "5"\n', 'training.steps = "5" has the wrong type', "an integer"),
    ("[training]\nsteps = 5.0\n", "training.steps = 5.0 has the wrong type", "an integer"),
    ("[compile]\nenable = 1\n", "compile.enable = 1 has the wrong type", "true | false"),
    ("[data]\npath = 5\n", "data.path = 5 has the wrong type", "a string"),
    ("[moe]\nlayers = [1, true]\n", "moe.layers = [1, true] has the wrong type", "a list of integers"),
    ("[moe.router]\nname = 1\n", "moe.router = a dict has the wrong type", "a string"),
    ("model = 3\n", "model = 3: model is a table", "[model]"),
    ("[training\n", "is not valid TOML", "line"),
    ("[optimiser]\nlr = 1e-3\n", "[optimiser]: no such table", "Did you mean [optimizer]?"),
]


@pytest.mark.parametrize(("text", "problem", "remedy"), TOMLS, ids=[row[0] for row in TOMLS])
def test_wrong_toml(text: str, problem: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert main(["check", "--config", str(path)]) == 2
    rule, hint = capsys.readouterr().err.splitlines()
    assert problem in rule
    assert remedy in hint


def test_missing_file_names_those_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", "train_configs/debgu.toml"]) == 2
    err = capsys.readouterr().err
    assert "cannot read the config train_configs/debgu.toml" in err
    assert "debug.toml" in err


def test_every_number_has_one_range() -> None:
    listed = (*AT_LEAST_ONE, *ABOVE_ZERO, *FROM_ZERO_TO_ONE, *BY_ITSELF)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= {key for key, field in all_fields().items() if field.type in (int, float)}


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chekc"]) == 2
    assert "Did you mean check?" in capsys.readouterr().err
