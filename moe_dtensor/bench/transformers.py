"""``bench transformers``: a Qwen3-MoE of transformers, trained with these experts and with its own, in turn.

The same model, weights and tokens for all: only ``experts_implementation`` changes. Two things are timed, forward and
backward: one block's experts alone, and the whole model with its loss. No optimizer.

T tokens, D width, F expert hidden width, E experts, K choices. Experts' FLOPs: ``18 T K D F``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dtensor.bench.measure import provenance, several, wait
from moe_dtensor.config.command_line import write_json
from moe_dtensor.integrations.transformers import NAME, register

IMPLEMENTATIONS = (NAME, "grouped_mm", "eager")
MAX_ERROR = 2e-2
"""Relative error of the experts in bf16 above which a time is not reported."""
_ROUNDS = 3
_QWEN3_30B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
}
_TINY = _QWEN3_30B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
    "intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WIDTHS = {"qwen3_30b": _QWEN3_30B, "tiny": _TINY}


@dataclass(frozen=True)
class Options:
    """What ``bench transformers`` builds and measures."""

    widths: str
    """A key of :data:`WIDTHS`."""
    layers: int
    """Blocks, all of them MoE."""
    sequences: int
    length: int
    """Tokens of a sequence."""
    implementations: tuple[str, ...]
    json: Path | None


@dataclass(frozen=True)
class Timed:
    """Forward and backward of one thing, milliseconds."""

    milliseconds: float
    """Median."""
    spread: tuple[float, float]
    peak_gib: float | None
    """Highest memory above what lay there before, gradients included; None on a CPU."""


@dataclass(frozen=True)
class Result:
    """One implementation."""

    implementation: str
    first_call_seconds: float = 0.0
    """Of the experts: compilation of kernels included."""
    errors: dict[str, float] | None = None
    """The experts' output and gradients against float32 eager: ``norm(a - b) / norm(b)``."""
    experts: Timed | None = None
    experts_tflops: float = 0.0
    model: Timed | None = None
    tokens_per_second: float = 0.0
    loss: float = 0.0
    failure: str = ""


def bench_transformers(options: Options) -> list[Result]:
    """Measure each implementation, alternating between them; print lines, and write JSON if asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    register()
    model = build(options, device)
    tokens_BS = torch.randint(WIDTHS[options.widths]["vocab_size"], (options.sequences, options.length), device=device)
    results = _experts(model, options, device)
    _model(model, tokens_BS, results)
    for result in results.values():
        print(_line(result), flush=True)
    if options.json:
        _write(options, list(results.values()), sum(p.numel() for p in model.parameters()))
    return list(results.values())


def build(options: Options, device: torch.device) -> nn.Module:
    """The model with random weights: bf16 on a GPU, else float32."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        **WIDTHS[options.widths], num_hidden_layers=options.layers, max_position_embeddings=options.length
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _experts(model: Any, options: Options, device: torch.device) -> dict[str, Result]:
    """The first block's experts alone: errors first, then times."""
    block, sizes = model.model.layers[0].mlp, WIDTHS[options.widths]
    x_TD = torch.randn(options.sequences * options.length, sizes["hidden_size"], device=device, dtype=model.dtype)
    dy_TD = torch.randn_like(x_TD)
    with torch.no_grad():
        _, gate_TK, expert_TK = block.gate(x_TD)

    def gradients(experts: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {"x": x_TD.to(dtype).requires_grad_(), "gate": gate_TK.to(dtype).requires_grad_()}
        y_TD = experts(leaves["x"], expert_TK, leaves["gate"])
        leaves |= dict(experts.named_parameters())
        return {"y": y_TD.detach()} | dict(
            zip(leaves, torch.autograd.grad(y_TD, list(leaves.values()), dy_TD.to(dtype)), strict=True)
        )

    def step() -> None:
        y_TD = block.experts(x_TD.requires_grad_(), expert_TK, gate_TK.requires_grad_())
        y_TD.backward(dy_TD)
        x_TD.grad = gate_TK.grad = None
        block.experts.zero_grad()

    model.set_experts_implementation("eager")
    expected = gradients(copy.deepcopy(block.experts).float(), torch.float32)
    results = {}
    for name in options.implementations:
        model.set_experts_implementation(name)
        start = time.perf_counter()
        step()
        wait(x_TD)
        first = time.perf_counter() - start
        got = gradients(block.experts, x_TD.dtype)
        errors = {what: ((got[what].float() - right).norm() / right.norm()).item() for what, right in expected.items()}
        # Comparisons with NaN are false: a NaN fails too.
        right = all(error < MAX_ERROR for error in errors.values())
        results[name] = Result(name, first, errors, failure="" if right else f"wrong: {errors}")
        del got
    del expected
    flops = 18 * expert_TK.numel() * sizes["hidden_size"] * sizes["moe_intermediate_size"]
    for name, timed in _alternate(model, step, results).items():
        results[name] = replace(results[name], experts=timed, experts_tflops=flops / timed.milliseconds / 1e9)
    return results


def _model(model: Any, tokens_BS: Tensor, results: dict[str, Result]) -> None:
    """The whole model: loss, and time and memory of a forward and backward, into the results."""

    def step() -> None:
        model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        model.zero_grad()

    for name, timed in _alternate(model, step, results).items():
        with torch.no_grad():
            loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.item()
        tokens_per_second = tokens_BS.numel() / timed.milliseconds * 1e3
        results[name] = replace(results[name], model=timed, tokens_per_second=tokens_per_second, loss=loss)


def _alternate(model: Any, step: Callable[[], None], results: dict[str, Result]) -> dict[str, Timed]:
    """Times of the step under each implementation that was right, in rounds that alternate between them."""
    cuda = model.device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name, result in results.items() if not result.failure}
    peaks: dict[str, float | None] = {}
    for _ in range(_ROUNDS):
        for name in times:
            model.set_experts_implementation(name)
            step()
            before = _memory(cuda)
            times[name] += several(step, cuda)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return {
        name: Timed(statistics.median(taken), (min(taken), max(taken)), peaks[name]) for name, taken in times.items()
    }


def _memory(cuda: bool) -> int:
    """Bytes of tensors on the GPU, from where its peak is counted anew; 0 on a CPU."""
    if not cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _line(result: Result) -> str:
    if result.experts is None or result.model is None:
        return f"{result.implementation:>12}  {result.failure}"
    worst = max(result.errors.values()) if result.errors else 0.0
    peak = f", {result.model.peak_gib:.2f} GiB above the weights" if result.model.peak_gib is not None else ""
    return (
        f"{result.implementation:>12}  experts {result.experts.milliseconds:9.2f} ms {result.experts_tflops:6.1f} "
        f"TFLOP/s, error {worst:.1e}; model {result.model.milliseconds:9.2f} ms, "
        f"{result.tokens_per_second:,.0f} tokens/s{peak}, loss {result.loss:.4f}"
    )


def _write(options: Options, results: Sequence[Result], parameters: int) -> None:
    assert options.json is not None
    what = {"what": "Qwen3-MoE of transformers, forward + backward, by experts_implementation; FLOPs = 18 T K D F"}
    about = {**asdict(options), "json": None, "sizes": WIDTHS[options.widths], "parameters": parameters}
    record = what | provenance() | {"options": about, "results": [asdict(result) for result in results]}
    write_json(options.json, record)
