"""Time ways to compute attention, forward and backward, after they have been compared with the plain form.

B sequences, S positions, H query heads, G key and value heads, C width of a query or key, V of a value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import statistics
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_dtensor.bench.measure import measure_memory, provenance, several
from moe_dtensor.config.check_model import has_flash_attention_4
from moe_dtensor.config.command_line import write_json
from moe_dtensor.kernels.attention import (
    Visible,
    attend,
    build_blocks,
    build_visible,
    first_visible,
    plain_attention,
    uses_flex,
)

MAX_ERROR = 0.02
"""Of bfloat16 against float32, relative to the norm."""
ROUNDS = 3


@dataclass(frozen=True)
class Shape:
    """What is computed."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    window: int = 0
    documents: bool = False
    """As long as the files of Python's standard library, one after the other."""
    sinks: bool = False


SHAPES: dict[str, tuple[Shape, ...]] = {
    "documents": (Shape(16, 2048, 16, 16, 64, 64), Shape(16, 2048, 16, 16, 64, 64, documents=True)),
    "window": (Shape(2, 8192, 16, 16, 128, 128), Shape(2, 8192, 16, 16, 128, 128, window=128)),
    "gpt_oss": (
        Shape(1, 8192, 64, 8, 64, 64),
        Shape(1, 8192, 64, 8, 64, 64, sinks=True),
        Shape(1, 8192, 64, 8, 64, 64, window=128, sinks=True),
    ),
    # The second has as many FLOPs in plain heads.
    "mla": (Shape(1, 4096, 128, 128, 192, 128), Shape(1, 4096, 160, 160, 128, 128)),
    "mla_documents": (Shape(1, 4096, 128, 128, 192, 128, documents=True),),
    "tiny": (Shape(2, 40, 4, 2, 16, 16), Shape(2, 40, 4, 2, 16, 24, window=5, documents=True, sinks=True)),
}
DEFAULT = [name for name in SHAPES if name != "tiny"]


@dataclass
class Result:
    """One way on one shape; times are of a forward and a backward pass."""

    name: str
    shape: dict[str, Any]
    way: str
    milliseconds: float | None = None
    milliseconds_spread: tuple[float, float] | None = None
    tflops: float | None = None
    """Of the scores that are seen: two products forward, five backward."""
    error: dict[str, float] = dataclasses.field(default_factory=dict)
    kept_mib: float | None = None
    peak_mib: float | None = None
    failure: str = ""


class Inputs:
    """Leaves, and what queries see."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

        size = (shape.batch, shape.length)
        # As projections give them: heads beside one another in a position.
        self.q = draw(*size, shape.heads, shape.width).transpose(1, 2).requires_grad_()
        self.k = draw(*size, shape.kv_heads, shape.width).transpose(1, 2).requires_grad_()
        self.v = draw(*size, shape.kv_heads, shape.value_width).transpose(1, 2).requires_grad_()
        self.dy = draw(*size, shape.heads, shape.value_width).transpose(1, 2)
        self.sink = draw(shape.heads).requires_grad_() if shape.sinks else None
        self.documents = _documents(*size).to(device) if shape.documents else None
        self.first = first_visible(self.documents, shape.window, size, device)
        self.scale = shape.width**-0.5
        self.leaves = [t for t in (self.q, self.k, self.v, self.sink) if t is not None]
        self.seen = float((torch.arange(shape.length, device=device) - self.first + 1).double().mean())

    def clear(self) -> None:
        """Drop gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def bench_attention(names: list[str], out: str | None) -> list[Result]:
    """Every way that takes each shape; printed as they come.

    Args:
        names: keys of :data:`SHAPES`.
        out: JSON file to write.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"--shapes {unknown[0]} is unknown. Choose among {', '.join(SHAPES)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = []
    for name in names:
        for shape in SHAPES[name]:
            results += _bench_shape(name, shape, device, dtype)
    if out:
        content = provenance() | {"results": [dataclasses.asdict(result) for result in results]}
        write_json(out, content)
    return results


def _bench_shape(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Result]:
    inputs = Inputs(shape, device, dtype)
    flops = 7 * shape.batch * shape.length * shape.heads * (shape.width + shape.value_width) * inputs.seen
    expected = _expected(shape, inputs)
    found = {way: Result(name, dataclasses.asdict(shape), way) for way in _ways(shape, inputs)}
    runs: dict[str, Callable[[], Tensor]] = {}
    for way, run in _ways(shape, inputs).items():
        try:
            _judge(run, inputs, expected, found[way])
            runs[way] = run
        except (AssertionError, RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            found[way].failure = f"{type(error).__name__}: {error}"[:500]
        inputs.clear()
    times: dict[str, list[float]] = {way: [] for way in runs if not found[way].failure}
    for _ in range(ROUNDS):
        for way in times:
            times[way] += several(functools.partial(_step, runs[way], inputs), device.type == "cuda")
    for way, taken in times.items():
        middle = statistics.median(taken)
        found[way].milliseconds, found[way].milliseconds_spread = middle, (min(taken), max(taken))
        found[way].tflops = flops / middle / 1e9
    for result in found.values():
        print(_line(result), flush=True)
    return list(found.values())


def _step(run: Callable[[], Tensor], inputs: Inputs) -> None:
    torch.autograd.grad(run(), inputs.leaves, inputs.dy)


def _ways(shape: Shape, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """What layers do comes first; the others are what there is beside it."""
    q, k, v, scale, gqa = inputs.q, inputs.k, inputs.v, inputs.scale, shape.heads != shape.kv_heads
    size, device = (shape.batch, shape.length), q.device
    flex = uses_flex("auto", min(shape.width, shape.value_width), q.dtype, device)
    visible = build_visible(inputs.documents, shape.window, size, device, flex=flex, sinks=shape.sinks)
    chosen = lambda seen: attend(q, k, v, seen, scale=scale, sink_H=inputs.sink)  # noqa: E731
    ways: dict[str, Callable[[], Tensor]] = {"attend": lambda: chosen(visible)}
    if shape.documents or shape.window or shape.sinks:
        if shape.documents and not (shape.window or shape.sinks):
            ways["varlen"] = _varlen(shape, inputs)
        if flex:

            def with_mask() -> Tensor:
                first = first_visible(inputs.documents, shape.window, size, device)
                return chosen(Visible(first, build_blocks(first)))

            ways["attend, and its mask"] = with_mask
        return ways
    sdpa = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)  # noqa: E731
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        ways[f"sdpa {backend.name.split('_')[0].lower()}"] = _forced(sdpa, backend)
    if shape.width > shape.value_width:
        padding = (0, shape.width - shape.value_width)
        ways["values padded"] = lambda: F.scaled_dot_product_attention(
            q, k, F.pad(v, padding), is_causal=True, scale=scale
        )[..., : shape.value_width]
    if has_flash_attention_4() and q.dtype == torch.bfloat16:
        ways["fa4"] = lambda: attend(q, k, v, visible, scale=scale, backend="fa4")
    if flex:
        plain = Visible(inputs.first, build_blocks(inputs.first))
        ways["flex"] = lambda: chosen(plain)
    return ways


def _forced(run: Callable[[], Tensor], backend: SDPBackend) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return forced


def _varlen(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """torch's attention over sequences of their own lengths, told on the host."""
    index = torch.arange(shape.length, device=inputs.first.device)
    starts = (inputs.first == index).flatten().nonzero().flatten()
    ends = torch.cat((starts, starts.new_tensor([shape.batch * shape.length]))).to(torch.int32)
    longest = int(ends.diff().max())

    def run() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v))
        # Its window of (-1, 0) is causal; torch before 2.12 says so by a flag of its own.
        causal: dict[str, Any] = {"is_causal": True} if _takes(varlen_attn, "is_causal") else {"window_size": (-1, 0)}
        y: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=inputs.scale, **causal)
        return y.unflatten(0, (shape.batch, shape.length)).transpose(1, 2)

    return run


def _takes(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _expected(shape: Shape, inputs: Inputs) -> dict[str, Tensor]:
    """The plain form in float32 for the first sequence and the first key's heads: output and gradients."""
    group = shape.heads // shape.kv_heads
    q, k, v = (
        t[:1, :n].detach().float().requires_grad_() for t, n in ((inputs.q, group), (inputs.k, 1), (inputs.v, 1))
    )
    sink = None if inputs.sink is None else inputs.sink[:group].detach().float()
    y = plain_attention(q, k, v, inputs.first[:1], inputs.scale, sink)
    y.backward(inputs.dy[:1, :group].float())
    return {"y": y.detach()} | {name: t.grad for name, t in (("q", q), ("k", k), ("v", v)) if t.grad is not None}


def _judge(run: Callable[[], Tensor], inputs: Inputs, expected: dict[str, Tensor], result: Result) -> None:
    y = run()
    y.backward(inputs.dy)
    got = {"y": y.detach(), "q": inputs.q.grad, "k": inputs.k.grad, "v": inputs.v.grad}
    for name, right in expected.items():
        found = got[name]
        assert found is not None
        part = found[:1, : right.shape[1]].float()
        result.error[name] = float((part - right).norm() / right.norm())
    del y, got
    inputs.clear()
    leaves = {leaf.untyped_storage().data_ptr() for leaf in inputs.leaves}
    result.kept_mib, result.peak_mib = measure_memory(run, inputs.dy, leaves)
    # Comparisons with NaN are false: a NaN fails too.
    if not all(error < MAX_ERROR for error in result.error.values()):
        result.failure = f"wrong: {result.error}"


def _documents(batch: int, length: int) -> Tensor:
    """Numbers of documents ``(B, S)``: Python's standard library, byte by byte, an end token after each file."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sizes = torch.tensor([file.stat().st_size + 1 for file in files])
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
    ends = sizes[order].repeat(1 + batch * length // int(sizes.sum())).cumsum(0)
    return torch.searchsorted(ends, torch.arange(batch * length), right=True).view(batch, length)


def _line(result: Result) -> str:
    kind = [name for name in ("documents", "sinks") if result.shape[name]]
    kind += [f"window {result.shape['window']}"] if result.shape["window"] else []
    head = f"{result.name:>14} {result.way:>21} {', '.join(kind) or 'causal':>18}"
    if result.milliseconds is None:
        return f"{head}  {result.failure}"
    return (
        f"{head} {result.milliseconds:9.3f} ms {result.tflops:7.1f} TFLOP/s  error {max(result.error.values()):.1e}  "
        f"kept {result.kept_mib:7.1f} MiB  peak {result.peak_mib:8.1f} MiB {result.failure}"
    )
