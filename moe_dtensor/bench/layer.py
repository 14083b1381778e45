"""``bench layer``: one MoE layer, forward and backward, compiled as in training, timed beside its error.

The layer is the router's linear, top-k and gates, the expert MLP and the combine, with autograd around all of it.
Beside it, where they are installed, other projects' layers: fresh weights, same sizes, compiled where ours is.
T tokens, D model width, F expert hidden width, E experts, K choices, G up-projections.

FLOPs of a forward and backward: ``6 * T * K * (G + 1) * D * F`` for the experts (G + 1 is 3 for gated activations, 2
for plain ones) plus ``6 * T * D * E`` for the router. Activation, top-k and sums count as none.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe_dtensor.bench.measure import (
    break_down,
    measure_memory,
    peak_mib,
    provenance,
    record_kernels,
    several,
    wait,
)
from moe_dtensor.bench.shapes import Layer, Shape, parse_shape
from moe_dtensor.config.command_line import write_json
from moe_dtensor.kernels.experts.activation import num_up_projections
from moe_dtensor.kernels.experts.mlp import BACKENDS, choose_backend

MAX_ERROR = 2e-2
"""Relative error in bf16 above which a time is not reported."""
MAX_ERROR_FLOAT8 = 1e-1
"""The same where products read three binary digits."""
_ROUNDS = 6
RECORDED = 3
"""Steps whose kernels are recorded."""


@dataclass
class Result:
    """One backend (or peer) on one shape."""

    shape: dict[str, Any]
    backend: str
    skew: str
    compiled: bool
    """Whether it ran by ``torch.compile``."""
    error: dict[str, float] = field(default_factory=dict)
    """Relative error against float32, of the output and of each gradient: ``norm(a - b) / norm(b)``."""
    milliseconds: float | None = None
    """Median of a forward and backward; None if the answer was wrong or the backend failed."""
    milliseconds_spread: tuple[float, float] | None = None
    tflops: float | None = None
    dense_tflops: float | None = None
    """FLOPs of the experts' products by one weight for all rows, in the same rounds: a bound."""
    graph_tflops: float | None = None
    """The same step captured in a CUDA graph and replayed: without the host's part."""
    called_tflops: float | None = None
    """The same step as two graphs, forward and backward, that autograd calls, as in a training loop of one's own
    (``torch.cuda.make_graphed_callables``)."""
    kept_mib: float = 0.0
    """What autograd holds between forward and backward, parameters aside."""
    kept_mib_formula: float = 0.0
    peak_mib: float = 0.0
    """Highest memory of a forward and backward, above parameters and input; gradients included."""
    first_call_seconds: float = 0.0
    load_max_over_mean: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step by kernel name."""
    failure: str = ""


def _installed_backends() -> tuple[str, ...]:
    return ("torch", "triton", *(name for name in ("grouped_gemm", "quack") if find_spec(name)))


def bench_layer(
    shapes: Sequence[str] = ("mixtral", "olmoe", "qwen3_30b", "neox125m"),
    backends: Sequence[str] = (),
    skew: str = "0",
    json_path: str | None = None,
    compiled: bool | None = None,
) -> list[Result]:
    """Time one MoE layer per shape and backend; print a table, and write JSON if asked.

    Times come from CUDA events (the host's clock on a CPU): medians of rounds that alternate between the backends,
    since a card under load slows down and separate runs do not compare.

    Args:
        shapes: names, or ``T,D,F,E,K,activation``.
        backends: names, ``float8`` among them for ``moe.expert_dtype``. Empty: on CUDA torch,
            triton, and grouped_gemm and quack where they are installed, reference elsewhere; and installed peers.
        skew: ``0`` near-uniform routing; ``zipf``: odds of expert e proportional to ``1 / (e + 1)``.
        json_path: file for the results with commit, versions and device.
        compiled: run backends and peers by ``torch.compile``, as training does. None: on CUDA.

    Returns:
        One :class:`Result` for each pair.

    Raises:
        ValueError: an unknown shape, backend or skew.
    """
    if skew not in ("0", "zipf"):
        raise ValueError(f"--skew {skew!r} is not known. Use 0 or zipf.")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    compiled = cuda if compiled is None else compiled
    peers = {"torchtitan": _torchtitan} if cuda and not backends and find_spec("torchtitan") else {}
    names = tuple(backends) or (_installed_backends() if cuda else ("reference",))
    for name in names:
        if name not in (*BACKENDS, "auto", "float8"):
            raise ValueError(f"--backends {name!r} is not known. Use auto or some of {', '.join(BACKENDS)}, float8.")
    results: list[Result] = []
    for shape in [parse_shape(text) for text in shapes]:
        layer = Layer(shape, skew, device, dtype, compiled)
        runs: dict[str, Callable[[], None]] = {name: partial(layer.step, name) for name in names}
        found = {name: Result(asdict(shape), _label(name, layer), skew, compiled) for name in names}
        expected = _reference_gradients(layer)
        for name in names:
            _check(layer, name, expected, found[name])
        del expected
        for name, build in peers.items():
            found[name] = Result(asdict(shape), name, skew, compiled)
            runs[name] = build(shape, layer, compiled)
            found[name].peak_mib = peak_mib(runs[name])
        _time(runs, found, layer, cuda)
        for result in found.values():
            print(_line(result), flush=True)
        results += found.values()
    if json_path:
        _write_json(Path(json_path), results)
    return results


def _label(name: str, layer: Layer) -> str:
    return name if name != "auto" else f"auto ({choose_backend(name, layer.x_TD, layer.w_up_EGFD)})"


def _reference_gradients(layer: Layer) -> dict[str, Any]:
    """The choice of experts, and output and gradients in float32 for that choice."""
    with torch.no_grad():
        expert_TK = layer.choose()
    whole = layer.as_float32()
    y_TD = whole("reference", expert_TK)
    y_TD.backward(layer.dy_TD.float())
    counts_E = expert_TK.flatten().bincount(minlength=layer.shape.experts).float()
    answers = {"y": y_TD.detach()} | {name: leaf.grad for name, leaf in whole.leaves.items()}
    return {"answers": answers, "load": (counts_E.max() / counts_E.mean()).item()}


def _check(layer: Layer, name: str, expected: dict[str, Any], result: Result) -> None:
    """First call, then errors against the reference and the memory of a step."""
    result.load_max_over_mean = expected["load"]
    result.kept_mib_formula = layer.shape.kept_bytes / 2**20
    try:
        start = time.perf_counter()
        layer.step(name)
        wait(layer.x_TD)
        result.first_call_seconds = time.perf_counter() - start
        layer.clear()
        y_TD = layer(name)
        y_TD.backward(layer.dy_TD)
    except (RuntimeError, ValueError, ImportError) as error:
        result.failure = f"{type(error).__name__}: {error}"[:500]
        return
    for what, right in expected["answers"].items():
        got = y_TD.detach() if what == "y" else layer.leaves[what].grad
        assert got is not None
        result.error[what] = ((got.float() - right).norm() / right.norm()).item()
    layer.clear()
    del y_TD, got, right
    parameters = {leaf.untyped_storage().data_ptr() for key, leaf in layer.leaves.items() if key != "x"}
    result.kept_mib, result.peak_mib = measure_memory(lambda: layer(name), layer.dy_TD, parameters)
    layer.clear()
    # Comparisons with NaN are false: a NaN fails too.
    allowed = MAX_ERROR_FLOAT8 if name == "float8" else MAX_ERROR
    if not all(error < allowed for error in result.error.values()):
        result.failure = f"wrong: {result.error}"


def _time(runs: dict[str, Callable[[], None]], found: dict[str, Result], layer: Layer, cuda: bool) -> None:
    """Alternate between the runs; medians into the results, and where a step's time goes."""
    times: dict[str, list[float]] = {name: [] for name in runs if not found[name].failure}
    dense, dense_times = dense_products(layer), list[float]()
    for _ in range(_ROUNDS):
        dense()
        dense_times += several(dense, cuda)
        for name in times:
            runs[name]()
            times[name] += several(runs[name], cuda)
            layer.clear()
    for name, taken in times.items():
        result = found[name]
        result.milliseconds = statistics.median(taken)
        result.milliseconds_spread = (min(taken), max(taken))
        result.tflops = layer.shape.flops / result.milliseconds / 1e9
        result.dense_tflops = layer.shape.expert_flops / statistics.median(dense_times) / 1e9
        if cuda:
            result.kernels = break_down(record_kernels(runs[name], RECORDED), RECORDED).kernels
        if cuda and name in ("torch", "triton", "quack", "float8"):
            result.graph_tflops = layer.shape.flops / graph_milliseconds(layer, name) / 1e9
            result.called_tflops = layer.shape.flops / called_milliseconds(layer, name) / 1e9


def _line(result: Result) -> str:
    how = "compiled" if result.compiled else "eager"
    head = f"{result.shape['name']:>12} {result.backend:>12} {how:>8} skew {result.skew:>4}"
    if result.milliseconds is None:
        return f"{head}  {result.failure}"
    worst = f"{max(result.error.values()):.1e}" if result.error else "not checked"
    graph = ""
    if result.graph_tflops and result.called_tflops:
        graph = f" ({result.graph_tflops:.1f} as a CUDA graph, {result.called_tflops:.1f} as two that autograd calls)"
    assert result.tflops is not None
    assert result.dense_tflops is not None
    return (
        f"{head} {result.milliseconds:9.3f} ms {result.tflops:7.1f} TFLOP/s{graph}, "
        f"{result.tflops / result.dense_tflops:.2f} of dense {result.dense_tflops:.1f}  error {worst}  "
        f"kept {result.kept_mib:7.1f} MiB  peak {result.peak_mib:8.1f} MiB  first {result.first_call_seconds:5.1f} s  "
        f"load {result.load_max_over_mean:4.2f}"
    )


def _write_json(path: Path, results: list[Result]) -> None:
    what = {"what": "MoE layer, forward + backward; FLOPs = 6 T K (G + 1) D F + 6 T D E"}
    record = what | provenance() | {"results": [asdict(result) for result in results]}
    write_json(path, record)


def _torchtitan(shape: Shape, layer: Layer, compiled: bool) -> Callable[[], None]:
    """torchtitan's layer (gated SiLU whatever the shape's activation), with softmax scores and no shared expert."""
    from torchtitan.models.moe import MoE, MoEArgs

    args = MoEArgs(
        num_experts=shape.experts,
        num_shared_experts=0,
        score_func="softmax",
        top_k=shape.top_k,
        score_before_experts=False,
        load_balance_coeff=None,
    )
    x_1TD, dy_1TD = layer.x_TD.detach()[None].requires_grad_(), layer.dy_TD[None]
    with torch.device(layer.x_TD.device):
        moe = MoE(args, shape.dim, shape.hidden)
    with torch.no_grad():
        moe.init_weights(0.02, layer.x_TD.device)
    moe.to(layer.x_TD.dtype)
    if compiled:
        moe.compile(dynamic=False)

    def step() -> None:
        moe(x_1TD).backward(dy_1TD)
        # No gradient outlives a step, so that its memory is a step's from nothing.
        moe.zero_grad()
        x_1TD.grad = None

    return step


def graph_milliseconds(layer: Layer, backend: str) -> float:
    """Milliseconds of a step captured in a CUDA graph and replayed."""
    leaves = list(layer.leaves.values())

    def step() -> None:
        torch.autograd.grad(layer(backend), leaves, layer.dy_TD)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return statistics.median(several(graph.replay, True) + several(graph.replay, True))


def called_milliseconds(layer: Layer, backend: str) -> float:
    """Milliseconds of a step whose forward and backward are graphs that autograd calls."""
    step = graphed_calls(layer, backend)
    with warnings.catch_warnings():
        # The leaves' nodes are from the capture, which has a stream of its own; they are waited for.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        return statistics.median(several(step, True) + several(step, True))


def graphed_calls(layer: Layer, backend: str) -> Callable[[], None]:
    """A step of the layer as a module of graphs; gradients are left where :meth:`.Layer.step` leaves them."""
    module = _Module(layer, backend)
    sample = layer.x_TD.detach().clone().requires_grad_()
    call: Any = torch.cuda.make_graphed_callables(module, (sample,))

    def step() -> None:
        layer.clear()
        call(layer.x_TD).backward(layer.dy_TD)

    return step


class _Module(torch.nn.Module):
    """The layer's weights as parameters: what a graph reads where it lies, and does not copy in."""

    def __init__(self, layer: Layer, backend: str) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend
        for name, leaf in layer.leaves.items():
            if name != "x":
                assert isinstance(leaf, torch.nn.Parameter)
                self.register_parameter(name, leaf)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.layer(self.backend, x_TD=x_TD)


def dense_products(layer: Layer) -> Callable[[], None]:
    """Run the matrix products of a layer's experts and their gradients with one weight for all rows: what a card does
    with the same FLOPs where nothing is routed."""
    shape = layer.shape
    rows, up = shape.tokens * shape.top_k, num_up_projections(shape.activation) * shape.hidden
    sizes = [(rows, shape.dim, up), (rows, shape.hidden, shape.dim)]
    operands = [
        tuple(torch.randn(size, device=layer.x_TD.device, dtype=layer.x_TD.dtype) for size in ((n, d), (f, d), (n, f)))
        for n, d, f in sizes
    ]

    def run() -> None:
        for x, w, dy in operands:
            x @ w.T
            dy @ w
            dy.T @ x

    return run
