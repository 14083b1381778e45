"""Configs by chance from the whole schema, on meshes by chance, judged one after the other; and the smallest config
that still fails, with the command that shows it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from moe_dtensor.config.check import ROUTERS
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import SPLIT_BACKWARD
from moe_dtensor.config.schema import Config, Schedule
from moe_dtensor.config.tables import Field, all_fields, show_value
from moe_dtensor.verify.miniature import Case, Layout, legal, whole_case
from moe_dtensor.verify.run import computation, prove
from moe_dtensor.verify.verdict import Verdict

MESHES = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1), (1, 3, 1))
SMALLEST: dict[str, Any] = {
    "model.num_layers": 2,
    "model.dim": 8,
    "model.num_heads": 4,
    "model.head_dim": 4,
    "model.hidden_dim": 8,
    "model.vocab_size": 61,
    "moe.num_experts": 4,
    "moe.hidden_dim": 8,
    "data.corpus": "random",
    "training.seq_len": 8,
    "training.microbatch_size": 1,
    "training.global_batch_size": 4,
    "training.dtype": "float64",
    "training.param_dtype": "float64",
    "training.reduce_dtype": "float64",
    "training.max_grad_norm": 0.1,
    "optimizer.lr": 0.01,
    "optimizer.weight_decay": 1.0,
    "lr_scheduler.warmup_steps": 0,
    "lr_scheduler.decay": "constant",
    "checkpoint.enable": False,
}
"""What a draw starts from; a mesh raises the batch where it has to."""
OTHER_TABLES = ("run", "mesh", "data", "compile", "checkpoint", "metrics", "profiling", "comm", "lr_scheduler")
"""Of these tables only what :data:`VALUES` names is drawn: the oracle is not asked about the others."""
LEFT_OUT = (
    *("model.init_std", "model.attention_backend", "moe.backend", "training.steps", "training.loss"),
    *("training.dtype", "training.param_dtype", "training.reduce_dtype", "training.deterministic"),
    *("training.validation_interval", "training.validation_sequences", "fsdp.cpu_offload", "pipeline.schedule"),
    *("training.nonfinite", "optimizer.state_dtype", "optimizer.rounding"),
)
VALUES: dict[str, tuple[Any, ...]] = {
    "model.num_layers": (1, 2, 3, 4, 6),
    "model.dim": (8, 12, 16, 24),
    "model.num_heads": (1, 2, 4, 8),
    "model.num_kv_heads": (0, 1, 2, 4),
    "model.head_dim": (2, 4, 6, 8),
    "model.hidden_dim": (8, 12, 20),
    "model.vocab_size": (5, 61, 64, 130),
    "model.norm_eps": (1e-6, 1e-3),
    "model.rope_theta": (100.0, 1e6),
    "model.window_theta": (0.0, 50.0),
    # Normed, a latent of one number is its sign, whose gradient is rounding.
    "model.q_rank": (0, 4, 8),
    "model.kv_rank": (0, 4, 8, 12),
    "moe.num_experts": (0, 1, 2, 3, 4, 6, 8, 16),
    "moe.top_k": (1, 2, 3, 4),
    "moe.hidden_dim": (4, 8, 12),
    "moe.every": (1, 2),
    "moe.layers": ((), (0,), (1,), (0, 2)),
    "moe.num_shared_experts": (0, 1, 2),
    "moe.router": ROUTERS,
    "moe.group_sequences": (0, 1, 2),
    "moe.sinkhorn_iterations": (1, 3, 8),
    "moe.gate_scale": (0.5, 2.5),
    "moe.expert_groups": (0, 2, 4),
    "moe.expert_groups_kept": (0, 1, 2, 3),
    "moe.jitter": (0.0, 0.1, 0.5),
    "moe.capacity_factor": (0.0, 0.5, 1.0, 1.1, 3.0),
    "moe.balance_loss": (0.0, 0.1, 1.0),
    "moe.z_loss": (0.0, 0.1),
    "moe.bias_rate": (0.0, 0.001, 0.1),
    "mesh.sequence_parallel": (True, False),
    "mesh.attention": ("heads", "sequences"),
    "mesh.experts": ("tp", "dp", "tp_hidden", "dp_tp"),
    "mesh.dp_replicate": (1, 2, 4),
    "mesh.expert_ranks": (0, 1, 2),
    "mesh.expert_weights": ("replicated", "sharded"),
    "mesh.lent_experts": (0, 1, 2),
    "mesh.dispatch": ("all_gather", "all_to_all", "one_sided", "auto"),
    "data.document_mask": (False, True),
    "pipeline.stages_per_rank": (0, 2, 3),
    "training.seq_len": (2, 4, 5, 7, 8, 12),
    "training.global_batch_size": (2, 4, 6, 8, 12),
    "training.microbatch_size": (1, 2, 3),
    "training.max_grad_norm": (0.0, 0.1, 100.0),
    "training.norm_type": (2.0, float("inf")),
    "training.seed": (1, 2, 3),
    "optimizer.beta1": (0.0, 0.5, 0.99),
    # Without memory of squares (0) an update is a mean of gradients over the last one: without a bound.
    "optimizer.beta2": (0.5, 0.9, 0.999),
    "optimizer.eps": (1e-8, 1e-4),
    "optimizer.weight_decay": (0.0, 0.1, 4.0),
    "optimizer.router_lr": (0.0, 0.1),
    "moe.top_k_by_layer": ((), (1, 2), (3, 1, 2)),
    "moe.router_by_layer": ((), ("topk", "sinkhorn"), ("hash", "topk"), ("sinkhorn", "zipf")),
    "lr_scheduler.warmup_steps": (0, 2, 4),
}
TOGETHER: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"moe.expert_groups": (2, 4), "moe.expert_groups_kept": (1, 2, 3), "moe.router": ("topk",)}
    | {"moe.group_score": ("top2", "max"), "moe.num_experts": (4, 8, 16)},
    {"moe.normalize_gates": (True,), "moe.top_k": (2, 3, 4)},
    {"moe.score_before_top_k": (False,), "moe.top_k": (1, 2, 3), "moe.score": ("auto", "softmax", "sigmoid")},
    {"moe.gate_on": ("input",), "moe.top_k": (1,)},
    {"moe.shared_gate": (True,), "moe.num_shared_experts": (0, 1, 2), "moe.shared_hidden_dim": (4, 8, 20)},
    {"moe.group_sequences": (1, 2), "training.microbatch_size": (2, 4)},
    {"mesh.attention": ("sequences",), "mesh.sequence_parallel": (True,), "training.microbatch_size": (2, 4)}
    | {"moe.group_sequences": (0, 1, 2)},
    {"model.num_heads": (2, 4, 8), "model.num_kv_heads": (1, 2, 4)},
    {"moe.router": ROUTERS, "moe.top_k": (1, 2, 3), "moe.capacity_factor": (0.0, 0.5, 1.1)},
    {"moe.router": ("expert_choice",), "moe.top_k": (1, 2), "moe.capacity_factor": (0.0,), "moe.bias_rate": (0.0,)}
    | {"moe.normalize_gates": (False,), "moe.score_before_top_k": (True,), "moe.gate_on": ("output",)}
    | {"moe.selection_bias": (False,), "moe.expert_groups": (0,), "moe.expert_groups_kept": (0,)}
    | {"moe.group_score": ("top2",)},
    {"model.kv_rank": (4, 8, 12), "model.q_rank": (0, 4, 8), "model.nope_dim": (2, 4, 6), "model.rope_dim": (2, 4)}
    | {"model.v_dim": (2, 4, 6), "model.num_kv_heads": (0,)}
    | {"model.qk_norm": ("none",), "model.attention_bias": ("none",), "model.clip_qkv": (0.0,)},
    {"model.window": (1, 2, 3, 5), "model.window_layers": (("window", "full"), ("full", "window", "window"), ())}
    | {"model.window_theta": (0.0, 50.0), "rope.scale_windows": (True, False)},
    {"rope.scaling": ("linear",), "rope.factor": (2.0, 4.0), "rope.attention_factor": (0.0, 1.3)},
    {"rope.scaling": ("llama3",), "rope.factor": (2.0, 8.0), "rope.original_length": (4, 32)}
    | {"rope.low": (1.0, 0.5), "rope.high": (2.0, 4.0)},
    {"rope.scaling": ("yarn",), "rope.factor": (2.0, 8.0), "rope.original_length": (4, 32)}
    | {"rope.beta_fast": (2.0, 32.0), "rope.beta_slow": (0.5, 1.0), "rope.attention_factor": (0.0, 1.3)},
    {"rope.scaling": ("longrope",), "rope.factor": (1.0, 4.0), "rope.original_length": (4, 32)}
    | {"rope.short_factors": ((1.0, 1.5), (1.0,), (1.0, 1.5, 3.0)), "rope.long_factors": ((2.0, 3.0), (4.0,))},
    {"compile.cuda_graph": (True,), "mesh.experts": ("tp", "dp"), "mesh.expert_ranks": (0, 1)}
    | {"fsdp.reshard_after_forward": ("auto", "never"), "fsdp.accumulate": ("whole", "auto")},
    {"compile.cuda_graph": (True,), "mesh.experts": ("tp", "dp"), "mesh.dispatch": ("all_gather", "one_sided")}
    | {"moe.num_experts": (4, 8), "moe.rows": ("worst",), "fsdp.accumulate": ("whole",)},
    {"moe.expert_dtype": ("float8",), "mesh.dispatch": ("all_gather", "all_to_all"), "moe.top_k": (1, 2)}
    | {"moe.gate_on": ("output", "input"), "mesh.experts": ("tp", "dp", "dp_tp")},
    {"mesh.experts": ("dp", "dp_tp"), "mesh.expert_ranks": (1, 2), "mesh.expert_weights": ("replicated", "sharded")},
    {"mesh.lent_experts": (1, 2, 4), "mesh.experts": ("tp", "dp", "dp_tp"), "moe.router": ("zipf", "topk", "hash")}
    | {"moe.num_experts": (4, 8, 16), "moe.top_k": (1, 2, 3), "moe.expert_bias": (False, True)},
)
"""What is drawn at once, since one key alone is refused, and the values that switch it on."""
TRIES = 4
"""Draws of keys that stand together before they are left."""
SHARING = 8
"""Cases on the same mesh after each other, which share one start of its ranks."""
TIMEOUT = 900.0
"""Seconds for the cases that share ranks; what takes longer hangs."""


@dataclass(frozen=True)
class Drawn:
    """A case, and what of it differs from :data:`SMALLEST` on its mesh."""

    case: Case
    changes: dict[str, Any]


def fuzz(
    count: int,
    drawn: Iterator[Drawn],
    config_file: str,
    base: Config,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Judge ``count`` cases.

    Args:
        count: cases.
        drawn: the cases, of :func:`draws`.
        config_file: as the printed commands name it.
        base: the config in it, from which they differ.
        say: takes a line of progress, or a failure.
        keep: takes what is known so far, every few cases: an hour's work is not lost with its last minute.

    Returns:
        For JSON: ``cases``, ``distinct`` computations, ``drawn`` (how often each key was), ``failures`` (each with the
        smallest config's command), ``seconds``.
    """
    start, done = time.monotonic(), 0
    keys: Counter[str] = Counter()
    computations: set[str] = set()
    failures: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    while done < count:
        chunk = list(itertools.islice(drawn, min(SHARING, count - done)))
        for one, verdict in zip(chunk, prove([d.case for d in chunk], timeout=TIMEOUT), strict=True):
            done += 1
            keys.update(list(one.changes))
            computations.add(computation(one.case))
            if not verdict.ok:
                failures.append(_failure(one, verdict, config_file, base, [f["kind"] for f in failures]))
                say(_told(failures[-1]))
        say(f"{done} of {count} cases, {len(failures)} failed, {time.monotonic() - start:.0f} s")
        result = {
            "cases": done,
            "distinct": len(computations),
            "failed": len(failures),
            "failures": failures,
            "drawn": dict(sorted(keys.items())),
            "seconds": round(time.monotonic() - start),
        }
        keep(result)
    return result


def _failure(drawn: Drawn, verdict: Verdict, file: str, base: Config, known: list[str]) -> dict[str, Any]:
    """What is told of a failure. Of a kind that was seen before nothing is shrunk: that takes a minute."""
    kind = _kind(verdict)
    if kind not in known:
        drawn = shrink_failure(drawn, lambda case: _kind(_judge(case)) == kind)
        verdict = _judge(drawn.case)
    return {"kind": kind, "command": command(drawn.case, file, base), "changes": drawn.changes, **verdict.to_json()}


def _judge(case: Case) -> Verdict:
    (verdict,) = prove([case], timeout=TIMEOUT)
    return verdict


def _kind(verdict: Verdict) -> str:
    """What failures have in common that are likely to be one: what a rank raised, or the kind of the first deviation
    and the parameter's name without its block."""
    if verdict.ok:
        return ""
    if verdict.failure:
        return verdict.failure.strip().splitlines()[-1][:200]
    return f"{verdict.worst.kind} {'.'.join(w for w in verdict.worst.name.split('.') if not w.isdigit())}"


def _told(failure: dict[str, Any]) -> str:
    what = failure["failure"] or f"{failure['worst_kind']} {failure['worst_name']}: error {failure['worst_error']}"
    return f"FAILED {failure['mesh']} {failure['schedule']}: {what}\n  {failure['command']}"


def draws(
    seed: int,
    on_each_mesh: int = SHARING,
    meshes: Sequence[tuple[int, int, int]] = MESHES,
    schedules: Sequence[str] = get_args(Schedule),
) -> Iterator[Drawn]:
    """Cases without end, the same for the same arguments and schema; several on a mesh after each other, to share
    ranks."""
    for number in range(1 << 30):
        order = random.Random(f"{seed} {number}")
        dp, pp, tp = order.choice(meshes)
        for _ in range(on_each_mesh):
            layout = Layout(dp, pp, tp, order.choice(schedules) if pp > 1 else "none")
            yield draw(layout, order)


def draw(layout: Layout, order: random.Random) -> Drawn:
    """One case: each of some keys in turn takes a value by chance, if the config stays legal on the layout."""
    config = smallest(layout)
    changes: dict[str, Any] = {}
    fields = all_fields()
    groups = [{key: values_of(fields[key])} for key in drawn_keys() if values_of(fields[key])] + list(TOGETHER)
    for values in order.sample(groups, order.randint(1, len(groups) // 2)):
        for _ in range(TRIES if len(values) > 1 else 1):
            wanted = {key: order.choice(choices) for key, choices in values.items()}
            if legal(changed := override(config, wanted), [layout]):
                config = changed
                changes |= wanted
                break
    return Drawn(whole_case(layout, config), changes)


def smallest(layout: Layout) -> Config:
    """:data:`SMALLEST` with the fewest sequences and blocks that the layout takes."""
    for layers in (2, 3, 4, 6):
        for batch in (4, 6, 8, 12):
            config = override(Config(), SMALLEST | {"model.num_layers": layers, "training.global_batch_size": batch})
            if legal(config, [layout]):
                return config
    raise ValueError(f"{layout} takes no small config.")


def drawn_keys() -> list[str]:
    """Every key that the oracle's answer may depend on, or how it is computed: new ones of the schema too."""
    together = {key for values in TOGETHER for key in values}
    return [
        key
        for key, field in all_fields().items()
        if key not in LEFT_OUT
        and (key in VALUES or key in together or (field.table not in OTHER_TABLES and values_of(field)))
    ]


def values_of(field: Field) -> tuple[Any, ...]:
    """Values to draw from; none where the schema does not tell and :data:`VALUES` neither."""
    if field.key in VALUES:
        return VALUES[field.key]
    if field.type is bool:
        return (False, True)
    if get_origin(field.type) is Literal:
        return get_args(field.type)
    if field.item is not None and get_origin(field.item) is Literal:
        names = get_args(field.item)
        return ((), *((name,) for name in names), names)
    if field.type is int:
        return (field.default, field.default + 1, field.default + 2)
    if field.type is float:
        return (field.default, 2 * field.default, field.default / 2) if field.default else (0.0, 0.1, 1.0)
    return ()


def shrink_failure(drawn: Drawn, fails: Callable[[Case], bool], most: int = 60) -> Drawn:
    """The smallest of the drawn changes that still fails: halves of them, then quarters, at last each by itself is
    taken back where the failure stays.

    Args:
        drawn: a case that fails.
        fails: whether a case does.
        most: cases to try.
    """
    layout, changes, tried = drawn.case.layout, drawn.changes, 0

    def still(layout: Layout, changes: dict[str, Any]) -> bool:
        nonlocal tried
        config = override(smallest(layout), changes)
        if tried >= most or not legal(config, [layout]):
            return False
        tried += 1
        return fails(whole_case(layout, config))

    layout = next((simpler for simpler in reversed(_simpler(layout)) if still(simpler, changes)), layout)
    size = max(1, len(changes) // 2)
    while size:
        at = 0
        while at < len(changes):
            fewer = dict([*changes.items()][:at] + [*changes.items()][at + size :])
            if still(layout, fewer):
                changes = fewer
            else:
                at += size
        size //= 2
    return Drawn(whole_case(layout, override(smallest(layout), changes)), changes)


def _simpler(layout: Layout) -> list[Layout]:
    """Layouts of fewer ranks to try, the simplest last."""
    fewer = []
    if layout.schedule in SPLIT_BACKWARD or layout.schedule.startswith("Interleaved"):
        fewer.append(Layout(layout.dp, layout.pp, layout.tp, "1F1B"))
    if layout.dp > 1 and (layout.pp > 1 or layout.tp > 1):
        fewer.append(Layout(1, layout.pp, layout.tp, layout.schedule))
    if layout.pp > 1:
        fewer.append(Layout(layout.dp, 1, layout.tp))
    if layout.tp > 1:
        fewer.append(Layout(layout.dp, layout.pp, 1, layout.schedule))
    return [*fewer, Layout(1, 1, 1)] if layout.world_size > 1 else []


def command(case: Case, config_file: str, base: Config) -> str:
    """The command line that judges a case again: what of its config differs from ``base``, the one in the file."""
    words = ["python -m moe_dtensor verify --config", config_file, "--exact --meshes", case.layout.mesh]
    if case.layout.pp > 1:
        words += ["--schedules", case.layout.schedule]
    told = {*SMALLEST, *drawn_keys()}
    for key, field in all_fields().items():
        value, old = (getattr(getattr(c, field.table), field.name) for c in (case.config, base))
        if key in told and value != old:
            words += [f"--{key}", _word(value)]
    return " ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "''"
    return value if isinstance(value, str) else show_value(value)
