"""``bench generate``: new tokens a second of a Hugging Face folder, here and by transformers' own ``generate``.

The same weights and prompts, greedy, no end token: every prompt gets as many tokens. Reading the prompts counts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dtensor.bench.measure import provenance
from moe_dtensor.config.command_line import write_json
from moe_dtensor.generate.batch import Sampling, complete
from moe_dtensor.generate.load import Source, find_source, load_model
from moe_dtensor.train.ranks import end_ranks, start_ranks

OURS = "moe_dtensor"
_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """What ``bench generate`` runs."""

    checkpoint: Path
    """A Hugging Face folder."""
    batches: tuple[int, ...]
    """Prompts at once."""
    prompt: int
    """Tokens of a prompt."""
    tokens: int
    """New tokens of each."""
    peers: tuple[str, ...]
    """Values of transformers' ``experts_implementation``: grouped_mm, eager."""
    json: Path | None


@dataclass(frozen=True)
class Result:
    """One implementation with one number of prompts."""

    implementation: str
    batch: int
    seconds: float
    """Median."""
    spread: tuple[float, float]
    tokens_per_second: float
    peak_gib: float | None
    """None on a CPU."""
    alike: float
    """Share of the new tokens before the first that differs from ours."""


def bench_generate(options: Options) -> list[Result]:
    """Time each number of prompts, ours first and then transformers'; print lines, and write JSON if asked."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    source = find_source(options.checkpoint, {"training.param_dtype": str(dtype).removeprefix("torch.")}, 1)
    device = start_ranks(source.config)
    generator = torch.Generator().manual_seed(0)
    shape = max(options.batches), options.prompt
    prompts_BS = torch.randint(source.config.model.vocab_size, shape, generator=generator)
    found: dict[tuple[str, int], tuple[list[float], float | None, list[list[int]]]] = {}
    for name in (OURS, *options.peers):
        build = _ours(source, device) if name == OURS else _theirs(options.checkpoint, dtype, device, name)
        for batch in options.batches:
            found[name, batch] = _time(functools.partial(build, prompts_BS[:batch], options.tokens), cuda)
        del build
        if cuda:
            torch.cuda.empty_cache()
    end_ranks()
    results = [
        _result(name, batch, times, peak, _alike(ids, found[OURS, batch][2]))
        for (name, batch), (times, peak, ids) in found.items()
    ]
    for result in results:
        print(_line(result), flush=True)
    if options.json:
        about = {**asdict(options), "json": None, "checkpoint": options.checkpoint.name}
        record = {"what": "generate, greedy"} | provenance() | {"options": about, "results": list(map(asdict, results))}
        write_json(options.json, record)
    return results


def _time(run: Callable[[], list[list[int]]], cuda: bool) -> tuple[list[float], float | None, list[list[int]]]:
    """Seconds of each round after a first one, the peak in GiB, and the new tokens."""
    ids = run()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(_ROUNDS):
        # Both give their tokens to the host, so nothing is still on its way.
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else None, ids


Generate = Callable[[Tensor, int], list[list[int]]]
"""From prompts ``(B, S)`` and a number of tokens, the new ids of each."""


def _ours(source: Source, device: torch.device) -> Generate:
    model = load_model(source, device)

    def generate(prompt_BS: Tensor, tokens: int) -> list[list[int]]:
        completions, _ = complete(model, prompt_BS.tolist(), tokens, Sampling(), set())
        return [completion.ids for completion in completions]

    return generate


def _theirs(folder: Path, dtype: torch.dtype, device: torch.device, experts: str) -> Generate:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None

    def generate(prompt_BS: Tensor, tokens: int) -> list[list[int]]:
        on_device = prompt_BS.to(device)
        all_BS = model.generate(
            on_device, attention_mask=torch.ones_like(on_device), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return [row[prompt_BS.shape[1] :] for row in all_BS.tolist()]

    return generate


def _result(name: str, batch: int, seconds: list[float], peak: float | None, alike: tuple[float, int]) -> Result:
    median = statistics.median(seconds)
    share, tokens = alike
    return Result(name, batch, median, (min(seconds), max(seconds)), tokens / median, peak, share)


def _alike(ids: list[list[int]], ours: list[list[int]]) -> tuple[float, int]:
    """The share of tokens before the first that differs, and how many there are."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(ids, ours, strict=True)
    )
    return same / sum(map(len, ids)), sum(map(len, ids))


def _line(result: Result) -> str:
    peak = f", {result.peak_gib:.2f} GiB" if result.peak_gib is not None else ""
    return (
        f"{result.implementation:>12}  batch {result.batch:>3}  {result.seconds:7.3f} s "
        f"{result.tokens_per_second:10,.0f} tokens/s{peak}, {result.alike:.0%} as ours"
    )
