"""What one field may hold, by itself. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_dtensor.config.schema import Config
from moe_dtensor.config.tables import all_fields, show

MINIMUM: dict[str, float] = {
    "model.num_layers": 1,
    "model.dim": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.clip_qkv": 0,
    "model.attention_scale": 0,
    "model.rotary_dim": 0,
    "model.window": 0,
    "model.window_theta": 0,
    "model.q_rank": 0,
    "model.kv_rank": 0,
    "model.nope_dim": 0,
    "model.rope_dim": 0,
    "model.v_dim": 0,
    "model.vocab_size": 0,
    "model.hidden_dim": 0,
    "model.mtp_depth": 0,
    "rope.original_length": 0,
    "rope.attention_factor": 0,
    "moe.num_experts": 0,
    "moe.top_k": 1,
    "moe.hidden_dim": 1,
    "moe.every": 1,
    "moe.num_shared_experts": 0,
    "moe.shared_hidden_dim": 0,
    "moe.group_sequences": 0,
    "moe.sinkhorn_iterations": 1,
    "moe.expert_groups": 0,
    "moe.expert_groups_kept": 0,
    "moe.capacity_factor": 0,
    "moe.balance_loss": 0,
    "moe.z_loss": 0,
    "moe.bias_rate": 0,
    "mesh.pp": 1,
    "mesh.tp": 1,
    "mesh.dp_replicate": 1,
    "mesh.expert_ranks": 0,
    "mesh.lent_experts": 0,
    "pipeline.stages_per_rank": 0,
    "training.steps": 1,
    "training.seq_len": 1,
    "training.global_batch_size": 1,
    "training.microbatch_size": 1,
    "training.mtp_weight": 0,
    "training.max_grad_norm": 0,
    "training.seed": 0,
    "training.validation_interval": 0,
    "training.max_skipped": 1,
    "training.check_replicas": 0,
    "training.validation_sequences": 0,
    "training.sample_tokens": 1,
    "training.sample_temperature": 0,
    "eval.interval": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.router_lr": 0,
    "training.routing_drift_interval": 0,
    "lr_scheduler.warmup_steps": 0,
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 0,
    "metrics.log_interval": 1,
    "profiling.first_step": 1,
    "profiling.steps": 1,
    "comm.timeout_seconds": 1,
}
ABOVE_ZERO = (
    "model.norm_eps",
    "model.rope_theta",
    "model.init_std",
    "rope.factor",
    "rope.low",
    "rope.beta_slow",
    "moe.gate_scale",
    "model.embedding_scale",
    "model.residual_scale",
    "model.logit_scale",
    "mesh.link_bandwidth",
    "mesh.device_memory",
    "optimizer.eps",
)
SHARES = (
    "data.max_bad_records",
    "moe.jitter",
    "optimizer.beta1",
    "optimizer.beta2",
    "lr_scheduler.decay_fraction",
    "lr_scheduler.min_lr_ratio",
)


def out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (rule with value, remedy) for each field whose value makes no sense whatever the others say."""
    values = {key: getattr(getattr(config, field.table), field.name) for key, field in all_fields().items()}
    for key, least in MINIMUM.items():
        if values[key] < least:
            yield f"{key} = {show(values[key])} is too small.", f"Set {key} to {least} or more."
    for key in ABOVE_ZERO:
        if values[key] <= 0:
            yield f"{key} = {show(values[key])} must be above 0.", f"The default is {show(all_fields()[key].default)}."
    for key in SHARES:
        if not 0 <= values[key] <= 1:
            yield f"{key} = {show(values[key])} lies outside 0 to 1.", f"Give {key} a share from 0 to 1."
    for key, what in (
        ("optimizer.beta1", "would never forget"),
        ("optimizer.beta2", "would never forget"),
        ("moe.jitter", "could hide the router's input altogether"),
    ):
        if values[key] == 1:
            yield f"{key} = 1.0 {what}.", f"Set {key} below 1."
    for key in all_fields():
        if values[key] == math.inf and key != "training.norm_type":
            yield f"{key} = inf is not finite.", f"Set {key} to a finite number."
    if values["mesh.dp"] < 1 and values["mesh.dp"] != -1:
        yield f"mesh.dp = {values['mesh.dp']} is no number of ranks.", "Set mesh.dp to 1 or more, or -1 for the rest."
    if values["training.seed"] >= 2**63:
        yield f"training.seed = {values['training.seed']} is too large.", "Set training.seed below 2^63."
    if values["checkpoint.keep_last"] == 1:
        yield (
            "checkpoint.keep_last = 1 would delete the only whole checkpoint while the next is written.",
            "Set checkpoint.keep_last to 2 or more, or 0 to keep all.",
        )
    if values["training.norm_type"] not in (2.0, math.inf):
        yield f"training.norm_type = {values['training.norm_type']} is not supported.", "Set it to 2 or inf."
