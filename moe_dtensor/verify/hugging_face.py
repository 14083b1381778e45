"""The transformers model in a folder against the oracle on the folder's weights: the same batch, logits, loss and every
gradient by its published name; and the table that tells it.

B sequences, S positions, T = B*S tokens, V vocabulary, D width.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_dtensor.checkpoint.hugging_face.rows import native_shapes
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.config.command_line import write_json
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.verify.oracle import Microbatch, Transformer, cross_entropy, gradient_norm
from moe_dtensor.verify.oracle_routing import Balance
from moe_dtensor.verify.verdict import Deviation, Verdict, deviate, deviate_scalar, missing

LIMITS = {"float32": 2e-5, "float64": 1e-9}
"""Of logits and streams ``‖difference‖ / ‖oracle's‖``, of loss and gradients likewise."""


@dataclass(frozen=True)
class Found:
    """One side's answer."""

    logits_TV: Tensor
    loss: float
    gradients: dict[str, Tensor]
    """By published name."""
    streams: dict[str, Tensor]
    """``(T, D)`` on the way, by place."""


def report(folder: Path, dtypes: Sequence[str], json_file: Path | None = None) -> int:
    """Print a row for each dtype and what is wrong below; 1 if anything is, else 0."""
    source = HuggingFaceSource(folder)
    console = Console(width=None if Console().is_terminal else 160)
    family = source.described.family
    table = Table(title=f"{folder}: {family.architecture} against one plain float64 process", title_justify="left")
    for column in ("dtype", "logits", "loss", "gradients", "worst gradient", "error", "ratio of norms", "s", ""):
        table.add_column(column, overflow="fold")
    verdicts = list(prove_folder(source, dtypes))
    for verdict in verdicts:
        worst = worst_gradient(verdict)
        table.add_row(
            verdict.mesh,
            *(f"{verdict.largest(kind):.1e}" for kind in ("logits", "loss", "gradient")),
            worst.name,
            f"{worst.error:.1e}",
            f"{worst.ratio:.6g}",
            f"{verdict.seconds:.1f}",
            "ok" if verdict.ok else "FAIL",
            style=None if verdict.ok else "red",
        )
    console.print(table)
    for verdict in verdicts:
        if not verdict.ok:
            console.print(f"{verdict.mesh}:", markup=False, highlight=False)
            for line in explain(verdict, source):
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if json_file:
        write_json(json_file, [v.to_json() for v in verdicts])
    return 0 if all(v.ok for v in verdicts) else 1


def worst_gradient(verdict: Verdict) -> Deviation:
    """The gradient that is farthest off."""
    return max((d for d in verdict.deviations if d.kind == "gradient"), key=lambda d: d.error)


def prove_folder(source: HuggingFaceSource, dtypes: Sequence[str] = ("float32", "float64")) -> Iterator[Verdict]:
    """A verdict on the model of a folder in each dtype.

    Raises:
        ConfigError: transformers is not installed.
    """
    batch = _batch(source.own_config.model.vocab_size)
    expected = ask_oracle(source, batch)
    for dtype in dtypes:
        start = time.perf_counter()
        found = ask_transformers(source.folder, batch, dtype)
        deviations = tuple(compare(found, expected, LIMITS[dtype]))
        yield Verdict(dtype, "transformers", deviations, time.perf_counter() - start)


def _batch(vocab_size: int) -> Microbatch:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, vocab_size, (2, 24), generator=generator) for _ in range(2))
    return Microbatch(tokens, labels)


def compare(found: Found, expected: Found, limit: float) -> Iterator[Deviation]:
    """Logits, loss, what passes between parts of the blocks, and gradients."""
    yield deviate("logits", "logits", found.logits_TV, expected.logits_TV, limit, 0.0)
    yield deviate_scalar("loss", "loss", found.loss, expected.loss, limit)
    for name, stream in found.streams.items():
        yield deviate(name, "stream", stream, expected.streams[name], limit, 0.0)
    size = gradient_norm(expected.gradients, 2.0)
    for name in {**expected.gradients, **found.gradients}:
        if name in found.gradients and name in expected.gradients:
            yield deviate(name, "gradient", found.gradients[name], expected.gradients[name], limit, size)
        else:
            yield missing(name, "gradient", limit)


def explain(verdict: Verdict, source: HuggingFaceSource) -> list[str]:
    """Where a failing verdict's forward pass first goes wrong, with that part's tensors, and the worst gradients."""
    failed = [d for d in verdict.deviations if not d.ok]
    order = [
        *(d for d in verdict.deviations if d.kind == "stream"),
        *(d for d in verdict.deviations if d.kind == "logits"),
    ]
    lines = []
    wrong = next((d for d in order if not d.ok), None)
    if wrong is not None:
        names = _tensors_before(wrong.name, source)
        lines.append(f"{wrong.name} differs by {wrong.error:.1e}, all before it agrees: it is made by {names}")
    for d in sorted((d for d in failed if d.kind == "gradient"), key=lambda d: -d.error)[:8]:
        lines.append(f"gradient of {d.name}: {d.told}")
    return lines


def _tensors_before(place: str, source: HuggingFaceSource) -> str:
    """The published tensors that stand between a place in the forward pass and the place before it."""
    block, _, what = place.partition(" ")
    if place == "logits":
        prefixes: tuple[str, ...] = (
            "norm.",
            "output.",
            "tok_embeddings." if "output.weight" not in source.rows else "norm.",
        )
    elif what == "feed-forward input":
        prefixes = (f"{block}.attention", f"{block}.ffn_norm")
    elif block == "layers.0":
        prefixes = ("tok_embeddings.",)
    else:
        before = f"layers.{int(block.split('.')[1]) - 1}"
        prefixes = (f"{before}.moe.", f"{before}.feed_forward.")
    rows = [row for name, row in source.rows.items() if name.startswith(prefixes)]
    names = [re.sub(r"\{e\}", "*", row.file) for row in rows]
    spelled = []
    for name, row in zip(names, rows, strict=True):
        words = [word for axis in row.entry.words for word in row.entry.words[axis]]
        spelled += [re.sub(r"\{\w\}", word, name) for word in words] if words else [name]
    theta = ["rope_theta"] if what == "feed-forward input" else []
    return ", ".join(dict.fromkeys([*spelled, *theta]))


class _Recorded(Transformer):
    """The oracle, noting what goes into each block and into each feed-forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.streams: dict[str, Tensor] = {}

    def _norm(self, name: str, x: Tensor) -> Tensor:
        y = super()._norm(name, x)
        block, _, which = name.rpartition(".")
        if which == "attention_norm":
            self.streams[f"{block} input"] = x.detach().reshape(-1, x.shape[-1])
        elif which == "ffn_norm":
            self.streams[f"{block} feed-forward input"] = y.detach().reshape(-1, x.shape[-1])
        return y


def ask_oracle(source: HuggingFaceSource, batch: Microbatch) -> Found:
    """The oracle's forward and backward pass over the folder's weights, in float64."""
    config = source.own_config
    # transformers leaves multi-token prediction out.
    config = replace(config, model=replace(config.model, mtp_depth=0))
    config = replace(config, training=replace(config.training, param_dtype="float64", dtype="float64"))
    weights: dict[str, Tensor] = {}
    for name, shape in native_shapes(config).items():
        value = torch.empty(shape, dtype=torch.float64)
        source.read(name, whole(shape), value)
        weights[name] = value.requires_grad_(not name.endswith("router.bias"))
    experts = config.moe.num_experts
    none = torch.zeros(experts, dtype=torch.float64)
    balance = {
        i: Balance(weights.pop(f"layers.{i}.moe.router.bias", none), [0] * experts) for i in sorted(moe_layers(config))
    }
    model = _Recorded(config, weights, balance, training=False)
    logits_TV = model.logits(batch)[0]
    loss = cross_entropy(logits_TV, batch.labels.reshape(-1)) / batch.labels.numel()
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, weight in weights.items():
        row = source.rows[name]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for file, at in row.files():
            if file not in gradients:
                gradients[file] = torch.zeros(row.file_shape, dtype=torch.float64)
            row.store(gradient, at, gradients[file])
    return Found(logits_TV.detach(), float(loss.detach()), gradients, model.streams)


def ask_transformers(folder: str | Path, batch: Microbatch, dtype: str) -> Found:
    """The folder's own class, in float64 without what it narrows."""
    with InFloat64() if dtype == "float64" else contextlib.nullcontext():
        model = load_model(folder, getattr(torch, dtype))
        streams: dict[str, Tensor] = {}
        hooks = list(_record(model, streams))
        logits_BSV = model(input_ids=batch.tokens, use_cache=False).logits
        logits_TV = logits_BSV.flatten(0, 1).to(getattr(torch, dtype))
        loss = nn.functional.cross_entropy(logits_TV, batch.labels.reshape(-1))
        loss.backward()
        for hook in hooks:
            hook.remove()
        gradients = {
            name: torch.zeros_like(param) if param.grad is None else param.grad
            for name, param in model.named_parameters()
            if "bias" not in name.rpartition(".")[2] or param.grad is not None
        }
        return Found(logits_TV.detach(), float(loss.detach()), published(model, gradients), streams)


def load_model(folder: str | Path, dtype: torch.dtype) -> Any:
    """The model in evaluation, with plain attention and experts."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("--hf needs transformers.", 'Install it: pip install "moe_dtensor[hf]".') from None
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        options |= {"dtype": dtype, "experts_implementation": "eager"}
    else:
        options |= {"torch_dtype": dtype}
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def published(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by a model's parameter names to those by the names in files: transformers 5 stacks experts in memory."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def _record(model: nn.Module, streams: dict[str, Tensor]) -> Iterator[Any]:
    """Hooks that note what goes into each block and into each feed-forward."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            streams[name] = x.detach().reshape(-1, x.shape[-1])

        return hook

    for i, block in enumerate(blocks):
        yield block.register_forward_pre_hook(note(f"layers.{i} input"), with_kwargs=True)
        for name, child in block.named_children():
            if name in ("mlp", "block_sparse_moe", "ffn", "feed_forward"):
                hook = note(f"layers.{i} feed-forward input")
                yield child.register_forward_pre_hook(hook, with_kwargs=True)


class InFloat64(TorchFunctionMode):
    """Inside, whoever asks torch for float32 gets float64: casts of norms, softmax, rotary angles and routers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function's float32 arguments become float64."""
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*wide, **named)
