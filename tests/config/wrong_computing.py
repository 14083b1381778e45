"""Wrong settings of how a step is computed, for ``test_wrong_configs.py``."""

COMPUTING = [
    ("--compile.async_tp true", "compile.async_tp = true needs compile.enable = true", "Set both"),
    (
        "--compile.async_tp true --compile.enable true --mesh.sequence_parallel false",
        "needs mesh.sequence_parallel = true",
        "compile.async_tp = false",
    ),
    (
        "--compile.async_tp true --compile.enable true --mesh.tp 2 --mesh.attention sequences "
        "--training.microbatch_size 2",
        "compile.async_tp = true with mesh.attention = sequences",
        "Set compile.async_tp = false, or mesh.attention = heads",
    ),
    ("--compile.cuda_graph true --mesh.pp 2", "compile.cuda_graph = true needs mesh.pp = 1", "Set mesh.pp = 1, or"),
    (
        "--compile.cuda_graph true --mesh.tp 2",
        "moe.rows = exact and experts spread over 2 ranks: each layer reads",
        "Set moe.rows = worst",
    ),
    (
        "--compile.cuda_graph true --mesh.dp 2 --mesh.experts dp --mesh.dispatch all_to_all",
        "mesh.dispatch = all_to_all and experts spread over 2 ranks: an all-to-all reads",
        "Set mesh.dispatch = all_gather or one_sided, with moe.rows = worst",
    ),
    (
        "--compile.cuda_graph true --mesh.tp 2 --mesh.dispatch auto --moe.rows worst",
        "mesh.dispatch = auto and experts spread over 2 ranks",
        "Set mesh.dispatch = all_gather or one_sided",
    ),
    (
        "--compile.cuda_graph true --mesh.tp 2 --moe.rows worst --compile.enable true --compile.async_tp true",
        "compile.cuda_graph = true with compile.async_tp = true",
        "Set one of them to false",
    ),
    ("--compile.cuda_graph true --moe.backend grouped_gemm", "moe.backend = grouped_gemm", "moe.backend = auto"),
    (
        "--compile.cuda_graph true --fsdp.cpu_offload true",
        "fsdp.cpu_offload = true: weights and gradients have to stay",
        "Set fsdp.cpu_offload = false",
    ),
    (
        "--compile.cuda_graph true --fsdp.reshard_after_forward always",
        "fsdp.reshard_after_forward = always: weights",
        "Set fsdp.reshard_after_forward = never",
    ),
    (
        "--compile.cuda_graph true --fsdp.accumulate sharded",
        "fsdp.accumulate = sharded: weights",
        "Set fsdp.accumulate = whole",
    ),
    ("--model.attention_backend fa4", "fa4 computes in bfloat16, not training.param_dtype = float32", "= bfloat16"),
    (
        "--model.attention_backend fa4 --training.param_dtype bfloat16 --model.head_dim 20",
        "fa4 takes heads of up to 256 dimensions, in steps of 8, not of 20",
        "attention_backend = auto",
    ),
    (
        "--model.attention_backend fa4 --training.param_dtype bfloat16 --model.head_dim 264",
        "in steps of 8, not of 264",
        "the width of heads",
    ),
    (
        "--model.attention_backend fa4 --training.param_dtype bfloat16 --model.kv_rank 16 --model.nope_dim 8 "
        "--model.rope_dim 8 --model.v_dim 12",
        "in steps of 8, not of 12",
        "the width of heads",
    ),
    (
        "--model.attention_backend flex --training.dtype float64 --training.param_dtype float64 "
        "--training.reduce_dtype float64",
        "flex has no kernel for training.param_dtype = float64",
        "auto or plain",
    ),
    ("--moe.expert_dtype float8 --moe.backend torch", "float8 has no kernel in moe.backend = torch", "backend = auto"),
    (
        "--moe.expert_dtype float8 --moe.expert_bias true",
        "float8 does not take moe.expert_bias",
        "expert_dtype = param",
    ),
    ("--moe.expert_dtype float8 --mesh.tp 2 --mesh.experts tp_hidden", "scales whole rows", "Set mesh.experts = tp"),
    (
        "--moe.expert_dtype float8 --mesh.tp 2 --mesh.dispatch one_sided",
        "no kernels for mesh.dispatch = one_sided",
        "all_gather",
    ),
    (
        "--moe.expert_dtype float8 --mesh.pp 2 --pipeline.schedule ZBVZeroBubble",
        "float8 with pipeline.schedule = ZBVZeroBubble",
        "Set pipeline.schedule to 1F1B",
    ),
]
