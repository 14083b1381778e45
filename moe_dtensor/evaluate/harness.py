"""lm-eval's tasks on our meshes, through its own model interface."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.evaluate.choices import pair_request
from moe_dtensor.evaluate.score import Request, Score, score
from moe_dtensor.evaluate.text import Encoder, windows
from moe_dtensor.generate.batch import Model, Sampling, complete

MAX_NEW_TOKENS = 256  # lm-eval's, where a task says nothing


def check_installed() -> None:
    """Raise ConfigError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs the package lm-eval, which is not installed.",
            'Install it: pip install "moe_dtensor[eval]" (from a clone: pip install -e ".[eval]").',
        )


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's task manager, which has all of ``names``; its own tasks are looked through only if they are needed.

    Raises:
        ConfigError: a task that is neither in the folder nor among lm-eval's own.
    """
    from lm_eval.tasks import TaskManager

    include = str(folder) if folder else None
    manager = TaskManager(include_path=include, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=include)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--lm-eval {unknown[0]}: lm-eval has no such task" + (f", nor has {folder}." if folder else "."),
            "lm-eval ls tasks lists them; --lm-eval-tasks DIR adds a folder of task files.",
        )
    return manager


def run_tasks(
    model: Model,
    encoder: Encoder,
    names: Sequence[str],
    manager: Any,
    *,
    max_length: int,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task. Called by all ranks together; the result is rank 0's, elsewhere empty.

    Every rank holds all requests and builds the same batches, of which :func:`.score.score` gives each a share: lm-eval
    itself sees one process.
    """
    import lm_eval

    lm = build_lm(model, encoder, max_length, batch_size)
    # Bars belong on a terminal, and on one rank's.
    with _quiet(os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()):
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=0,
        )
    return {} if results is None else {name: _metrics(content) for name, content in results["results"].items()}


def build_lm(model: Model, encoder: Encoder, max_length: int, batch_size: int) -> Any:
    """A ``lm_eval.api.model.LM`` of a model on this rank."""
    from lm_eval.api.model import TemplateLM

    class MeshLM(TemplateLM):
        """Pairs are cut and begun as by lm-eval's own model of transformers."""

        @property
        def eot_token_id(self) -> int:
            return encoder.tokenizer.end_id

        @property
        def prefix_token_id(self) -> int:
            return encoder.prefix_id

        @property
        def max_length(self) -> int:
            return max_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return encoder(string, begin=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            made = [pair_request(context, continuation, max_length) for _, context, continuation in requests]
            return [(s.log_likelihood, s.greedy) for s in self._score(made)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            made = [
                list(windows(self.tok_encode(request.args[0]), encoder.prefix_id, max_length, max_length))
                for request in requests
            ]
            scores = iter(self._score([request for each in made for request in each]))
            return [sum(next(scores).log_likelihood for _ in each) for each in made]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_generate(model, encoder, request.args, max_length) for request in requests]

        def _score(self, requests: list[Request]) -> list[Score]:
            return score(model, requests, batch_size)

    return MeshLM()


def _generate(model: Model, encoder: Encoder, asked: tuple[str, dict[str, Any]], max_length: int) -> str:
    """The greedy continuation up to the first of the task's stop texts."""
    context, how = asked
    until = how.get("until") or []
    until = [until] if isinstance(until, str) else until
    count = int(how.get("max_gen_toks", MAX_NEW_TOKENS))
    if how.get("do_sample") and how.get("temperature", 0) > 0:
        raise ConfigError("--lm-eval: the task draws its answers.", "Choose one that takes the likeliest token.")
    ids = (encoder(context) or [encoder.prefix_id])[-max(1, max_length - count) :]
    ((made,), _) = complete(model, [ids], count, Sampling(), [encoder.tokenizer.end_id])
    text = encoder.tokenizer.decode(made.ids)
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text


def _metrics(content: dict[str, Any]) -> dict[str, float]:
    """Without lm-eval's ``,none``, which stands for no filter; and without what is no number."""
    named = {key.removesuffix(",none"): value for key, value in content.items()}
    return {key: value for key, value in named.items() if isinstance(value, int | float) and "stderr" not in key}


@contextlib.contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """Without lm-eval's warnings, and where ``silent`` without its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        finally:
            logger.setLevel(level)
