"""Wrong settings of where experts live and what tp divides, for ``test_wrong_configs.py``."""

PLACES = [
    ("--mesh.experts ep", 'mesh.experts = "ep" is not among its choices', "tp_hidden"),
    ("--mesh.dispatch alltoall", 'mesh.dispatch = "alltoall" is not among its choices', 'Did you mean "all_to_all"?'),
    ("--mesh.link_bandwidth 0", "mesh.link_bandwidth = 0.0 must be above 0", "450"),
    (
        "--mesh.dp 4 --mesh.experts dp --moe.num_experts 6",
        "moe.num_experts = 6 is not a multiple of mesh.dp = 4, over which mesh.experts = dp spreads them",
        "divisor of 6, or that to 8",
    ),
    (
        "--mesh.dp 2 --mesh.tp 8 --mesh.experts dp_tp",
        "moe.num_experts = 8 is not a multiple of mesh.dp * mesh.tp = 16, over which mesh.experts = dp_tp",
        "that to 16",
    ),
    (
        "--mesh.tp 4 --mesh.experts tp_hidden --moe.hidden_dim 510",
        "moe.hidden_dim = 510 is not a multiple of mesh.tp = 4, over which mesh.experts = tp_hidden",
        "moe.hidden_dim = 512",
    ),
    (
        "--mesh.tp 2 --mesh.experts tp_hidden --mesh.dispatch all_to_all",
        "mesh.dispatch = all_to_all sends tokens to where their experts are",
        "mesh.experts to tp, dp or dp_tp",
    ),
    (
        "--mesh.tp 2 --mesh.attention sequences --training.microbatch_size 3",
        "mesh.attention = sequences: training.microbatch_size = 3 is not a multiple of mesh.tp = 2",
        "Set training.microbatch_size = 4, or mesh.attention = heads",
    ),
    (
        "--mesh.tp 2 --mesh.attention sequences --mesh.sequence_parallel false",
        "mesh.attention = sequences with mesh.sequence_parallel = false",
        "Set mesh.sequence_parallel = true, or mesh.attention = heads",
    ),
    (
        "--mesh.dp 2 --mesh.experts dp_tp --mesh.dispatch one_sided",
        "mesh.dispatch = one_sided does not go with mesh.experts = dp_tp",
        "mesh.experts to tp or dp, or mesh.dispatch = all_gather",
    ),
    (
        "--mesh.tp 2 --mesh.sequence_parallel false --mesh.dispatch one_sided",
        "mesh.dispatch = one_sided does not go with mesh.sequence_parallel = false",
        "mesh.sequence_parallel = true",
    ),
    (
        "--mesh.tp 2 --mesh.pp 2 --pipeline.schedule ZBVZeroBubble --mesh.dispatch one_sided",
        "mesh.dispatch = one_sided does not go with pipeline.schedule = ZBVZeroBubble",
        "another schedule",
    ),
    (
        "--mesh.tp 2 --moe.expert_bias true --mesh.dispatch one_sided",
        "mesh.dispatch = one_sided does not go with moe.expert_bias = true",
        "moe.expert_bias = false",
    ),
    (
        "--mesh.dp 2 --mesh.experts dp --mesh.dispatch one_sided --moe.gate_on input --moe.top_k 1",
        "mesh.dispatch = one_sided does not go with moe.gate_on = input",
        "moe.gate_on = output",
    ),
    (
        "--mesh.dp 2 --mesh.experts dp --mesh.lent_experts 2 --mesh.dispatch one_sided",
        "mesh.lent_experts = 2 needs all choices on every rank, but mesh.dispatch = one_sided",
        "mesh.dispatch to all_gather",
    ),
    (
        "--mesh.dp 2 --mesh.experts dp --fsdp.cpu_offload true",
        "fsdp.cpu_offload = true with mesh.experts = dp, which leaves the experts out of FSDP",
        "mesh.experts to tp or tp_hidden",
    ),
]
