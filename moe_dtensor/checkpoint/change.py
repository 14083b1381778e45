"""Folders with other experts: a dense model upcycled, a mixture's experts pruned, merged or added.

How far a changed feed-forward is from the one before it is measured on random tokens. T tokens, D width.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from moe_dtensor.checkpoint import surgery, upcycle
from moe_dtensor.checkpoint.folder import Manifest, read_manifest
from moe_dtensor.checkpoint.hugging_face.convert import check_output, hidden_folder, progress
from moe_dtensor.checkpoint.hugging_face.export import copy_tokenizer
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.checkpoint.native import CONFIG_FILE, NativeWeights, alone, find_native, write_native
from moe_dtensor.checkpoint.storage import write_alone
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import dump_changes
from moe_dtensor.config.resolve import moe_layers
from moe_dtensor.config.schema import Config
from moe_dtensor.layers.feed_forward import FeedForward
from moe_dtensor.layers.moe import MoE
from moe_dtensor.layers.tokens import build_tokens

RUN_FILE = "run.json"
MEASURED_BLOCKS = 3
"""Whose deviation is told: the first, the last and one between."""


@dataclass(frozen=True)
class Dense:
    """What upcycling reads."""

    config: Config
    """Resolved for one rank."""
    shapes: dict[str, tuple[int, ...]]
    dtype: Callable[[str], torch.dtype]
    read: Callable[[str], Tensor]


def upcycle_folder(kind: str, source: Path, output: Path, how: upcycle.Upcycling) -> str:
    """Write the mixture that a dense model becomes, a folder to start from.

    Args:
        kind: of ``source``: hf or native.

    Returns:
        What was written, and how far the mixture is from the dense model.

    Raises:
        ConfigError: see :func:`.upcycle.upcycled_config`; nothing is left behind.
    """
    output = check_output(output)
    dense = _hugging_face(source) if kind == "hf" else _native(source)
    config = upcycle.upcycled_config(dense.config, how)
    shapes = upcycle.upcycled_shapes(dense.shapes, config)
    layers = sorted(moe_layers(config))
    experts = config.moe.num_experts

    def value(name: str) -> Tensor:
        made = mixture(name)
        done(made.numel() * made.element_size())
        return made

    plan = {name: (shape, dense.dtype(like or name)) for name, (shape, like) in shapes.items()}
    balance = {
        "bias": torch.zeros(len(layers), experts),
        "previous_load": torch.zeros(len(layers), experts, dtype=torch.float64),
    }

    def mixture(name: str) -> Tensor:
        return upcycle.upcycled(name, dense.read, config, how)

    far = 0.0
    for layer in _some(layers):
        old = _values(dense.shapes, dense.read, f"layers.{layer}.feed_forward.")
        new = _values(shapes, mixture, f"layers.{layer}.moe.")
        far = max(far, _deviation(layer, (dense.config, old, None), (config, new, None)))
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in plan.values())
    with hidden_folder(output) as hidden, progress("Upcycling", total) as done:
        has_tokenizer = copy_tokenizer(source, hidden)
        _write_config(hidden, output, config, own_tokenizer=has_tokenizer)
        write_native(hidden / config.checkpoint.folder, plan, value, balance)
    told = "the dense model" if how.exact else "not the dense model exactly"
    return (
        f"{output}: {experts} experts, top {config.moe.top_k}, in {len(layers)} blocks; {told}: what a block gives "
        f"differs by {far:.1e} of itself (the worst of {len(_some(layers))} blocks, random tokens)"
    )


def cut_folder(
    source: Path, output: Path, make: Callable[[int, Tensor, Tensor], surgery.Cut], noise: float = 0.0, seed: int = 0
) -> str:
    """Write a run with other experts, whose training goes on where it was.

    Args:
        source: a run or a checkpoint.
        make: gives a block's cut by its index, its router's rows ``(E, D)`` and its last step's load ``(E,)``.
        noise: of copies, as a share of a weight's standard deviation.

    Returns:
        What was written, what became of the optimizer's state, and how far the new model is from the old.
    """
    output = check_output(output)
    native = find_native(source)
    layers = sorted(moe_layers(native.config))
    if not layers:
        raise ConfigError(f"{source} is a dense model: it has no experts.", "Make some with --upcycle.")
    state = NativeWeights(native.checkpoint).read_all()
    model, balance = state["model"], state["balance"]
    cuts = {
        layer: make(layer, model[f"layers.{layer}.moe.router.weight"], balance["previous_load"][row])
        for row, layer in enumerate(layers)
    }
    config = surgery.cut_config(native.config, cuts)
    made = dict(state)
    made["model"] = {name: surgery.cut_parameter(name, value, cuts, noise, seed) for name, value in model.items()}
    made["balance"] = surgery.cut_balance(native.config, balance, cuts)
    if "optimizer" in state:
        made["optimizer"] = {k: surgery.cut_state(k, value, cuts) for k, value in state["optimizer"].items()}
    far = 0.0
    for row, layer in enumerate(layers):
        if layer in _some(layers):
            before, after = (
                (c, _values(s["model"], s["model"].__getitem__, f"layers.{layer}.moe."), s["balance"]["bias"][row])
                for c, s in ((native.config, state), (config, made))
            )
            far = max(far, _deviation(layer, before, after))
    with hidden_folder(output) as hidden:
        _write_config(hidden, output, config, own_tokenizer=copy_tokenizer(native.path, hidden))
        manifest = _manifest(native.checkpoint, made)
        manifest = _write_run(native.path, hidden, manifest)
        with alone():
            writer = write_alone(hidden / config.checkpoint.folder, manifest)
            dcp.save(made, storage_writer=writer, no_dist=True)
    kept = min(len(cut.survivors) for cut in cuts.values())
    optimizer = "no optimizer state is there"
    if "optimizer" in state:
        new = config.moe.num_experts - kept
        optimizer = f"of a block's experts {kept} keep their optimizer state, {new} start without"
    return (
        f"{output}: {config.moe.num_experts} experts for {native.config.moe.num_experts}, top {config.moe.top_k}; "
        f"{optimizer}; what a block gives differs by {far:.1e} of itself (the worst of {len(_some(layers))} "
        "blocks, random tokens)"
    )


def read_groups(text: str) -> int | Mapping[int, list[Any]] | list[Any]:
    """What ``FILE|N`` says: a number, or a JSON file's lists, of all blocks or by the block's index.

    Raises:
        ConfigError: it is neither.
    """
    if text.isdecimal():
        return int(text)
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
        return {int(k): list(v) for k, v in content.items()} if isinstance(content, dict) else list(content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{text} is neither a number nor a readable JSON file ({error}).",
            'Give a number, or a file such as {"0": [3, 5], "1": [0, 7]} or [3, 5] for all blocks.',
        ) from None


def _native(source: Path) -> Dense:
    native = find_native(source)
    weights = NativeWeights(native.checkpoint)
    shapes = {name: weights.shape(name) for name in weights.names()}
    return Dense(native.config, shapes, weights.dtype, weights.read)


def _hugging_face(source: Path) -> Dense:
    weights = HuggingFaceSource(source)
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith("router.bias")}

    def read(name: str) -> Tensor:
        out = torch.empty(shapes[name], dtype=weights.dtype(name))
        weights.read(name, whole(shapes[name]), out)
        return out

    return Dense(weights.own_config, shapes, weights.dtype, read)


def _some(layers: list[int]) -> list[int]:
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})[:MEASURED_BLOCKS]


def _values(names: Mapping[str, Any], read: Callable[[str], Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}


Side = tuple[Config, Mapping[str, Tensor], Tensor | None]


def _deviation(layer: int, before: Side, after: Side) -> float:
    old, new = (
        lambda x, side=side: feed_forward_output(side[0], layer, side[1], side[2], x) for side in (before, after)
    )
    return deviation(old, new, before[0].model.dim)


def _write_config(hidden: Path, output: Path, config: Config, own_tokenizer: bool) -> None:
    """Without what one rank alone made of it, or follows from batch sizes that the next run will choose."""
    training, group = config.training, config.moe.group_sequences
    follows = training.validation_sequences == training.global_batch_size
    config = replace(
        config,
        moe=replace(config.moe, group_sequences=0 if group == training.microbatch_size else group),
        training=replace(training, validation_sequences=0 if follows else training.validation_sequences),
        run=replace(config.run, folder=str(output), fresh=False),
        mesh=replace(config.mesh, dp=-1, pp=1, tp=1),
        pipeline=replace(config.pipeline, stages_per_rank=0),
        fsdp=replace(config.fsdp, reshard_after_forward="auto"),
        data=replace(config.data, tokenizer=str(output)) if own_tokenizer else config.data,
    )
    (hidden / CONFIG_FILE).write_text(dump_changes(config), encoding="utf-8")


def _manifest(checkpoint: Path, state: dict[str, Any]) -> Manifest:
    """Step, schedule and loader of a checkpoint; an older version kept them in ``state``, which they leave here."""
    manifest = read_manifest(checkpoint)
    schedule, loader, step = (state.pop(key, None) for key in ("schedule", "loader", "step"))
    if manifest is not None:
        return replace(manifest, files={})
    values = {"schedule": schedule, "loader": json.loads(loader)} if loader is not None else {}
    return Manifest("converted", "", step or 0, values)


def _write_run(source: Path, hidden: Path, manifest: Manifest) -> Manifest:
    """Mark the folder as a run's, so that training resumes in it with the optimizer's state; the checkpoint with it."""
    if not (source / RUN_FILE).is_file():
        return manifest
    run = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
    run |= {"run_id": uuid.uuid4().hex[:12], "finished_step": None, "saved_step": manifest.step}
    (hidden / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
    return replace(manifest, run_id=run["run_id"])


TOKENS = 64


def feed_forward_output(
    config: Config, layer: int, values: Mapping[str, Tensor], bias_E: Tensor | None, x_TD: Tensor
) -> Tensor:
    """What the feed-forward or the mixture of one block gives for normalised tokens ``(T, D)``, in evaluation.

    Args:
        config: resolved.
        layer: index of the block.
        values: parameters by their name within the module.
        bias_E: the selection bias, if there is one.
        x_TD: the dtype that is computed in.
    """
    config = replace(config, moe=replace(config.moe, backend="reference"))
    with torch.device("meta"):
        module: nn.Module
        if layer in moe_layers(config):
            module = MoE(config, layer)
        else:
            model = config.model
            module = FeedForward(model.dim, model.hidden_dim, model.activation, model.ffn_bias)
    module.to_empty(device="cpu").to(x_TD.dtype).eval()
    module.load_state_dict({name: value.to(x_TD.dtype) for name, value in values.items()})
    if not isinstance(module, MoE):
        return module(x_TD)
    experts = config.moe.num_experts
    module.router.bias = torch.zeros(experts) if bias_E is None else bias_E.float()
    module.router.previous_load = torch.zeros(experts)
    ids_BS = torch.zeros(1, len(x_TD), dtype=torch.int64)
    return module(x_TD[None], build_tokens(ids_BS, None))[0][0]


@torch.no_grad()
def deviation(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], dim: int, dtype: torch.dtype = torch.float64
) -> float:
    """``‖after - before‖ / ‖before‖`` over random normalised tokens."""
    x_TD = torch.randn(TOKENS, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    old_TD, new_TD = before(x_TD), after(x_TD)
    return float((new_TD - old_TD).norm() / old_TD.norm())
