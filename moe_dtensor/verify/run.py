"""Run the library's own training step on a mesh's ranks and hold it against the oracle."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dtensor.config.build import override
from moe_dtensor.config.schema import Config
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer
from moe_dtensor.train.step import StepResult, train_step
from moe_dtensor.verify import inputs
from moe_dtensor.verify.cases import Case
from moe_dtensor.verify.compare import (
    Deviation,
    Verdict,
    deviate,
    deviate_scalar,
    missing,
    relative_to,
    worst_of_each,
)
from moe_dtensor.verify.oracle import Answer, Batch, gradient_norm, steps
from moe_dtensor.verify.subject import Recorder, build_subject, full_parameters, load_bias, own_share

LIMITS = {
    "float64": {"gradient": 1e-9, "loss": 1e-9, "grad_norm": 1e-9, "parameter": 1e-9, "statistic": 1e-9},
    "float32": {"gradient": 1e-5, "loss": 1e-5, "grad_norm": 1e-5, "parameter": 1e-3, "statistic": 1e-4},
    # Gradients of another backend are judged by the reference's own error; this catches what both have wrong.
    "bfloat16": {"gradient": 0.1, "loss": 2e-2, "grad_norm": 5e-2, "parameter": 5e-2, "statistic": 5e-2},
}
"""Counts and biases, kinds ``routing`` and ``state``, have to be equal."""
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


Answers = dict[str, tuple[Mapping[str, Tensor], Mapping[int, Tensor], Sequence[Batch], Sequence[Answer]]]
IRRELEVANT = {"moe.backend": "auto", "moe.rows": "exact", "mesh.experts": "tp", "mesh.dispatch": "all_gather"}
"""How a thing is computed, which the oracle does not ask."""


def prove(cases: Sequence[Case], *, timeout: float = 600.0) -> Iterator[Verdict]:
    """Judge each case; cases that follow one another on the same mesh share one start of its ranks.

    Ranks are on GPUs (nccl) where there is one for each, else on the CPU (gloo).

    Args:
        cases: at miniature size; the oracle loops over tokens.
        timeout: seconds for all cases of one mesh together.

    Yields:
        A verdict for each case in order. A rank that raises or hangs is a failure with its traceback, not an exception.
    """
    answers: Answers = {}
    for _, same_mesh in itertools.groupby(cases, key=lambda case: case.layout.mesh):
        yield from _prove_on_one_mesh(list(same_mesh), answers, timeout)


def _prove_on_one_mesh(cases: list[Case], answers: Answers, timeout: float) -> Iterator[Verdict]:
    world_size = cases[0].layout.world_size
    device = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    tasks = [_task(case, answers) for case in cases]
    try:
        backend = "nccl" if device == "cuda" else "gloo"
        ranks = run_on_ranks(_run_tasks, world_size, tasks, device, timeout=timeout, backend=backend)
    except (RuntimeError, TimeoutError) as error:
        if len(cases) == 1:
            lost = missing("no answer", "gradient", 0.0)
            yield Verdict(cases[0].layout.mesh, cases[0].layout.schedule, (lost,), failure=str(error))
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
        yield Verdict(case.layout.mesh, case.layout.schedule, deviations + lost_parameters, seconds)


def _task(case: Case, answers: Answers) -> Task:
    """Inputs and answer depend on the config but not on the mesh: computed once for all meshes."""
    config = case.layout.place(case.config)
    key = repr((override(case.config, IRRELEVANT), case.empty_expert, case.steps))
    if key not in answers:
        initial = inputs.initial_values(config, empty_expert=case.empty_expert)
        bias = inputs.initial_bias(config)
        batches = [inputs.global_batch(config, step) for step in range(1, case.steps + 1)]
        answers[key] = initial, bias, batches, steps(config, initial, batches, bias)
    return Task(config, *answers[key])


def _run_tasks(tasks: Sequence[Task], device: str) -> list[tuple[list[Deviation], float]]:
    """On every rank: the deviations that this rank sees, and the seconds, of each task."""
    where = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    results = []
    for task in tasks:
        start = time.perf_counter()
        deviations = judge(task, where)
        results.append((deviations, time.perf_counter() - start))
    return results


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
    trainer, recorder = build_subject(task.config, task.initial, device, replayed)
    load_bias(trainer, task.bias)
    for number, (batch, answer) in enumerate(zip(task.batches, task.answers, strict=True), 1):
        result = train_step(trainer, own_share(trainer, batch))
        for deviation in itertools.chain(
            _compare_weights(trainer, recorder, answer), _compare_numbers(trainer, result, answer)
        ):
            yield replace(deviation, step=number)


def _compare_weights(trainer: Trainer, recorder: Recorder, answer: Answer) -> Iterator[Deviation]:
    limits = LIMITS[trainer.config.training.param_dtype]
    size = gradient_norm(answer.gradients, 2.0)
    for kind, found, expected in (
        ("gradient", recorder.gradients, answer.gradients),
        ("parameter", full_parameters(trainer), answer.parameters),
    ):
        for name, value in found.items():
            if value is None or name not in expected:
                yield missing(name, kind, limits[kind])
            else:
                yield deviate(name, kind, value, expected[name], limits[kind], size)


def _compare_numbers(trainer: Trainer, result: StepResult, answer: Answer) -> Iterator[Deviation]:
    """Loss and norm, and of each MoE block what its router did and what balancing made of it."""
    dtype = trainer.config.training.param_dtype
    limits = LIMITS[dtype]
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
