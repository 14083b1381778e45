"""Judge drawn cases one after the other; shrink what fails, and say the command that shows it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from moe_dtensor.config.schema import Config
from moe_dtensor.verify.cases import Case
from moe_dtensor.verify.compare import Verdict
from moe_dtensor.verify.fuzz import Drawn, command, shrink_failure
from moe_dtensor.verify.run import computation, prove

TOGETHER = 8
"""Cases that share one start of their mesh's ranks."""
TIMEOUT = 900.0
"""Seconds for the cases that share ranks; what takes longer hangs."""


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
        drawn: the cases, of :func:`moe_dtensor.verify.fuzz.draws`.
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
        chunk = list(itertools.islice(drawn, min(TOGETHER, count - done)))
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
