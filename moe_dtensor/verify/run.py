"""Run the library's own training step on a mesh's ranks and hold it against the oracle."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import expert_groups, expert_ranks
from moe_dtensor.config.schema import Config
from moe_dtensor.data.loader import Batch as LoadedBatch
from moe_dtensor.estimate.memory import settle_accumulate
from moe_dtensor.kernels.experts.mlp import choose_backend
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.step import StepResult, evaluate, train_step
from moe_dtensor.verify import inputs
from moe_dtensor.verify.miniature import Case
from moe_dtensor.verify.oracle import Answer, Batch, gradient_norm, steps
from moe_dtensor.verify.subject import (
    Recorder,
    build_subject,
    full_parameters,
    load_bias,
    load_parameters,
    moments,
    own_share,
    restart,
)
from moe_dtensor.verify.verdict import (
    FLOOR,
    Deviation,
    Verdict,
    deviate,
    deviate_scalar,
    missing,
    relative_to,
    worst_of_each,
)

LIMITS = {
    "float64": {
        "gradient": 1e-9,
        "loss": 1e-9,
        "grad_norm": 1e-9,
        "moment": 1e-9,
        "update": 1e-6,
        "parameter": 1e-9,
        "statistic": 1e-9,
    },
    "float32": {
        "gradient": 1e-5,
        "loss": 1e-5,
        "grad_norm": 1e-5,
        "moment": 1e-4,
        "update": 1e-2,
        "parameter": 1e-3,
        "statistic": 1e-4,
    },
    # What another backend is given is the reference's own error; this catches what both have wrong.
    "bfloat16": {
        "gradient": 0.1,
        "loss": 2e-2,
        "grad_norm": 5e-2,
        "moment": 0.2,
        "update": 0.5,
        "parameter": 5e-2,
        "statistic": 5e-2,
    },
}
"""Counts and biases, kinds ``routing`` and ``state``, have to be equal. Ask :func:`limits_of`."""
FLOAT8 = {
    "float32": LIMITS["bfloat16"],
    "bfloat16": {"gradient": 0.3, "moment": 0.3, "update": 0.7},
}
"""With experts in float8, in place of those above: a number that rounding takes past the middle between two of E4M3
differs by a whole step, up to an eighth of it. In float64 hardly one does."""
UPDATE_FLOOR = 1e-2
"""An update smaller than this share of what AdamW moves a parameter by in a step is measured against that share."""
STATISTIC_FLOOR = 1e-2
"""A mean smaller than this is measured against this."""
UNSTABLE = ("differs_from_top_k", "sinkhorn_error")
"""Diagnostics of choices that narrow dtypes make otherwise or, replayed, do not make."""
BFLOAT16_FACTOR = 2.0
"""How much farther from the oracle than the reference backend another backend may be in bfloat16."""
BFLOAT16_LEAST = 2.0**-9
"""Rounding once to bfloat16: no backend is asked to be closer than twice that."""


@dataclass(frozen=True)
class Task:
    """What one start of the ranks works through: a placed config, its inputs, and the oracle's answer to each step."""

    config: Config
    initial: Mapping[str, Tensor]
    bias: Mapping[int, Tensor]
    batches: Sequence[Batch]
    answers: Sequence[Answer]
    skipped: tuple[int, ...] = ()
    restarted: int = 0


def limits_of(config: Config) -> dict[str, float]:
    """The limits for a config's dtype, and for experts in float8."""
    dtype = config.training.param_dtype
    float8 = config.moe.num_experts > 0 and config.moe.expert_dtype == "float8"
    return LIMITS[dtype] | (FLOAT8.get(dtype, {}) if float8 else {})


Answers = dict[str, tuple[Mapping[str, Tensor], Mapping[int, Tensor], Sequence[Batch], Sequence[Answer]]]


def computation(case: Case) -> str:
    """What tells a case from others: its placed config, without what does nothing there."""
    placed = case.layout.place(case.config)
    idle: dict[str, Any] = {"mesh.link_bandwidth": 1.0, "mesh.device_memory": 1.0}
    idle["fsdp.accumulate"] = settle_accumulate(placed).fsdp.accumulate
    if case.layout.pp == 1:
        idle |= {"pipeline.schedule": "1F1B"}
    if case.layout.tp == 1:
        idle |= {"mesh.sequence_parallel": True}
    if expert_groups(placed) == 1:
        idle |= {"mesh.expert_ranks": 0, "mesh.expert_weights": "replicated"}
    if expert_ranks(placed) == 1 or not placed.moe.num_experts:
        idle |= {"mesh.experts": "tp", "mesh.dispatch": "all_gather", "mesh.lent_experts": 0, "moe.rows": "exact"}
    return repr((override(placed, idle), case.empty_expert, case.steps, case.skipped, case.restarted))


IRRELEVANT = {
    "model.attention_backend": "auto",
    "moe.backend": "auto",
    "moe.rows": "exact",
    "moe.keep_rows": False,
    "mesh.experts": "tp",
    "mesh.dispatch": "all_gather",
    "mesh.lent_experts": 0,
    "mesh.dp_replicate": 1,
    "mesh.expert_ranks": 0,
    "mesh.expert_weights": "replicated",
    "fsdp.accumulate": "whole",
}
"""How a thing is computed, which the oracle does not ask."""


def prove(cases: Sequence[Case], *, timeout: float = 600.0, answers: Answers | None = None) -> Iterator[Verdict]:
    """Judge each case; cases that follow one another on the same mesh share one start of its ranks.

    Ranks are on GPUs (nccl) where there is one for each, else on the CPU (gloo).

    Args:
        cases: at miniature size; the oracle loops over tokens.
        timeout: seconds for all cases of one mesh together.
        answers: where the oracle's are kept, for several calls about the same configs.

    Yields:
        A verdict for each case in order. A rank that raises or hangs is a failure with its traceback, not an exception;
        an oracle that raises is one too.
    """
    answers = {} if answers is None else answers
    for _, same_mesh in itertools.groupby(cases, key=lambda case: case.layout.mesh):
        yield from _prove_on_one_mesh(list(same_mesh), answers, timeout)


def _prove_on_one_mesh(cases: list[Case], answers: Answers, timeout: float) -> Iterator[Verdict]:
    world_size = cases[0].layout.world_size
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    try:
        tasks = [_task(case, answers) for case in cases]
        backend = "nccl" if device == "cuda" else "gloo"
        ranks = run_on_ranks(_run_tasks, world_size, tasks, device, timeout=timeout, backend=backend)
    except Exception as error:
        if len(cases) == 1:
            lost = missing("no answer", "gradient", 0.0)
            yield Verdict(cases[0].layout.mesh, cases[0].layout.schedule, (lost,), failure=_told(error))
        else:
            # One case took the others with it: give each ranks of its own.
            for case in cases:
                yield from _prove_on_one_mesh([case], answers, timeout)
        return
    for i, (case, task) in enumerate(zip(cases, tasks, strict=True)):
        deviations = worst_of_each(itertools.chain.from_iterable(rank[i][0] for rank in ranks))
        absent = set(task.initial) - {d.name for d in deviations if d.kind == "gradient"}
        lost_parameters = tuple(missing(name, "gradient", 0.0) for name in sorted(absent))
        seconds = max(rank[i][1] for rank in ranks)
        verdict = Verdict(case.layout.mesh, case.layout.schedule, deviations + lost_parameters, seconds)
        yield replace(verdict, experts_ran_as=ranks[0][i][2])


def _told(error: Exception) -> str:
    """What a rank raised, with its traceback, or hung in; or what the oracle raised."""
    from_rank = isinstance(error, RuntimeError | TimeoutError)
    return str(error) if from_rank else f"the oracle: {type(error).__name__}: {error}"


def _task(case: Case, answers: Answers) -> Task:
    """Inputs and answer depend on the config but not on the mesh: computed once for all meshes."""
    config = case.layout.place(case.config)
    key = repr((override(case.config, IRRELEVANT), case.empty_expert, case.steps, case.skipped))
    if key not in answers:
        initial = inputs.initial_values(config, empty_expert=case.empty_expert)
        bias = inputs.initial_bias(config)
        batches = [inputs.global_batch(config, step) for step in range(1, case.steps + 1)]
        answers[key] = initial, bias, batches, steps(config, initial, batches, bias, case.skipped)
    return Task(config, *answers[key], case.skipped, case.restarted)


def _run_tasks(tasks: Sequence[Task], device: str) -> list[tuple[list[Deviation], float, str]]:
    """On every rank: of each task the deviations that this rank sees, the seconds, and what experts ran as."""
    where = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    results = []
    for task in tasks:
        start = time.perf_counter()
        deviations = judge(task, where)
        results.append((deviations, time.perf_counter() - start, _experts_run_as(task.config, where)))
    return results


def _experts_run_as(config: Config, device: torch.device) -> str:
    """The backend that the experts' sizes, dtype and device come to; empty without experts."""
    if not config.moe.num_experts:
        return ""
    hidden = config.moe.hidden_dim // (config.mesh.tp if config.mesh.experts == "tp_hidden" else 1)
    x_TD, w_EGFD = (
        torch.empty(shape, dtype=getattr(torch, config.training.param_dtype), device=device)
        for shape in ((0, config.model.dim), (0, 1, hidden, config.model.dim))
    )
    return choose_backend(config.moe.backend, x_TD, w_EGFD)


def judge(task: Task, device: torch.device) -> list[Deviation]:
    """One task on this rank: every quantity that it can see, compared."""
    found = list(_compare(task, device))
    if task.config.training.param_dtype != "bfloat16" or task.config.moe.backend == "reference":
        return found
    plain = replace(task, config=override(task.config, {"moe.backend": "reference"}))
    return list(relative_to(found, _compare(plain, device), BFLOAT16_FACTOR, BFLOAT16_LEAST))


def _compare(task: Task, device: torch.device) -> Iterator[Deviation]:
    replayed = () if task.config.training.param_dtype == "float64" else task.answers
    if task.config.compile.enable:
        torch.compiler.reset()  # what the case before compiled is not to be mistaken for this one's
    trainer, recorder = build_subject(task.config, task.initial, device, replayed, task.skipped)
    load_bias(trainer, task.bias)
    start = task.initial
    for number, (batch, answer) in enumerate(zip(task.batches, task.answers, strict=True), 1):
        if task.restarted and number == task.restarted + 1:
            coming = {skipped - task.restarted for skipped in task.skipped}
            again, recorder = build_subject(task.config, task.initial, device, replayed[task.restarted :], coming)
            trainer = restart(trainer, again)
        own = own_share(trainer, batch)
        result = train_step(trainer, own)
        for deviation in itertools.chain(
            _compare_gradients(trainer, recorder, answer),
            _compare_updates(trainer, start, answer),
            _compare_numbers(trainer, result, answer),
        ):
            yield replace(deviation, step=number)
        if task.config.training.param_dtype != "float64":
            # An update whose sign was rounded would make the next gradient another one, not a less exact one.
            load_parameters(trainer, start := answer.parameters)
        if answer.validation is not None:
            yield replace(_compare_evaluation(trainer, own, answer.validation), step=number)


def _compare_gradients(trainer: Trainer, recorder: Recorder, answer: Answer) -> Iterator[Deviation]:
    limit = limits_of(trainer.config)["gradient"]
    size = gradient_norm(answer.gradients, 2.0)
    for name, value in recorder.gradients.items():
        if value is None or name not in answer.gradients:
            yield missing(name, "gradient", limit)
        else:
            yield deviate(name, "gradient", value, answer.gradients[name], limit, size)


def _compare_updates(trainer: Trainer, start: Mapping[str, Tensor], answer: Answer) -> Iterator[Deviation]:
    """What the optimizer did: moments (of the second the root, which is of the gradient's size), by how much each
    parameter moved since ``start``, and where it is."""
    limits = limits_of(trainer.config)
    first = gradient_norm(answer.first_moments, 2.0)
    second = sum(float(v.sum()) for v in answer.second_moments.values()) ** 0.5
    for name, state in moments(trainer).items():
        if name not in answer.parameters:
            continue  # told with the gradients
        limit = limits["moment"]
        yield deviate(f"{name}.exp_avg", "moment", state.first, answer.first_moments[name], limit, first)
        root = answer.second_moments[name].sqrt()
        yield deviate(f"{name}.exp_avg_sq", "moment", state.second.double().sqrt(), root, limit, second)
        yield deviate_scalar(f"{name}.step", "moment", state.updates, answer.updates, 0.0)
    lr = trainer.config.optimizer.lr
    for name, value in full_parameters(trainer).items():
        if name in answer.parameters:
            found, expected = value.double().cpu(), answer.parameters[name]
            moved, right = found - start[name], expected - start[name]
            # What AdamW would move by where no entry is idle, times the share of it that is told from nothing.
            floor = lr * right.numel() ** 0.5 * UPDATE_FLOOR / FLOOR
            yield deviate(name, "update", moved, right, limits["update"], floor)
            yield deviate(name, "parameter", found, expected, limits["parameter"], 0.0)


def _compare_evaluation(trainer: Trainer, own: LoadedBatch, expected: float) -> Deviation:
    limit = limits_of(trainer.config)["loss"]
    return deviate_scalar("validation_loss", "validation", float(evaluate(trainer, [own])), expected, limit)


def _compare_numbers(trainer: Trainer, result: StepResult, answer: Answer) -> Iterator[Deviation]:
    """Loss and norm, and of each MoE block what its router did and what balancing made of it."""
    dtype = trainer.config.training.param_dtype
    limits = limits_of(trainer.config)
    yield deviate_scalar("loss", "loss", float(result.loss), answer.loss, limits["loss"])
    for k, (found, expected) in enumerate(zip(result.mtp_loss_K.tolist(), answer.mtp_losses, strict=True), start=1):
        yield deviate_scalar(f"mtp_loss_{k}", "loss", found, expected, limits["loss"])
    yield deviate_scalar("grad_norm", "grad_norm", float(result.grad_norm), answer.grad_norm, limits["grad_norm"])
    state = trainer.balance.state_dict()
    means_L = result.routing.mean_L | {"churn": result.churn_L}
    for i, layer in enumerate(sorted(answer.counts)):
        block, counts = f"layers.{layer}.moe.", answer.counts[layer].double()
        yield deviate(block + "load", "routing", result.routing.load_LE[i], counts, 0.0, 0.0)
        yield deviate(block + "previous_load", "state", state["previous_load"][i], counts, 0.0, 0.0)
        yield deviate(block + "bias", "state", state["bias"][i], answer.bias[layer], 0.0, 0.0)
        for name, expected in answer.means[layer].items():
            if dtype == "float64" or name not in UNSTABLE:
                found = float(means_L[name][i])
                yield deviate_scalar(block + name, "statistic", found, expected, limits["statistic"], STATISTIC_FLOOR)
