"""Shrink a config to a model that a laptop can prove things about, and keep all that decides what is computed.

Kept: activation, norms, attention with its biases, latents, windows and the rest, all of routing and balancing, K,
shared experts, which kinds of block there are, tied or not, the ratio of query to key/value heads and how key/value
heads divide over tp, sequence parallelism, recompute, the document mask, clipping, the optimizer. Each size is the
smallest that every mesh and schedule asked for accepts, and the widths differ, so that a transposed weight cannot pass.
A :class:`Layout` is such a mesh and schedule, a :class:`Case` a config to prove on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import (
    block_config,
    block_rotates,
    block_window,
    has_conversations,
    is_latent,
    moe_layers,
    own_routers,
    resolve,
)
from moe_dtensor.config.schema import Config, Data


@dataclass(frozen=True)
class Layout:
    """A mesh (dp, pp, tp) and the schedule of its pipeline (``none`` when pp = 1)."""

    dp: int
    pp: int
    tp: int
    schedule: str = "none"

    @property
    def mesh(self) -> str:
        """Such as ``2x1x4``."""
        return f"{self.dp}x{self.pp}x{self.tp}"

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.dp * self.pp * self.tp

    def place(self, config: Config) -> Config:
        """``config`` (not resolved) on this mesh, resolved.

        Raises:
            ConfigError: :mod:`moe_dtensor.config.check` refuses it.
        """
        changes: dict[str, Any] = {"mesh.dp": self.dp, "mesh.pp": self.pp, "mesh.tp": self.tp}
        if self.pp > 1:
            changes["pipeline.schedule"] = self.schedule
        placed = override(config, changes)
        check(placed, self.world_size)
        return resolve(placed, self.world_size)


@dataclass(frozen=True)
class Case:
    """A config to prove on a layout. ``config`` is not resolved."""

    layout: Layout
    config: Config
    empty_expert: bool = False
    steps: int = 1
    skipped: tuple[int, ...] = ()
    """Steps, from 1, in which one rank's gradient is made infinite."""
    restarted: int = 0
    """Step after which all is saved, built anew and loaded; 0: none."""


def whole_case(layout: Layout, config: Config) -> Case:
    """Four steps, of which the second is skipped; after the third the run is saved and goes on from its checkpoint."""
    return Case(layout, config, steps=4, skipped=(2,), restarted=3)


def legal(config: Config, layouts: Iterable[Layout]) -> bool:
    """Whether every layout accepts the config."""
    try:
        for layout in layouts:
            layout.place(config)
    except ConfigError:
        return False
    return True


def shrink(config: Config, layouts: Sequence[Layout], dtype: str = "float64", compiled: bool = False) -> Config:
    """The miniature of a config (not resolved) for all ``layouts`` at once, so that one oracle serves them all.

    Args:
        dtype: computation in this dtype; master weights and sums in it too, float32 for half precision.
        compiled: blocks compiled, as the config says how. Else nothing is.

    Raises:
        ConfigError: a layout does not accept the config at its full size, or verify cannot judge it.
    """
    for layout in layouts:
        layout.place(config)
    small = override(judged(config, dtype, compiled), _telling_updates(config))
    for step in (_shrink_widths, _shrink_heads, _shrink_experts, _shrink_layers, _shrink_batch):
        small = step(small, resolve(config, 1), layouts)
    return small


def judged(config: Config, dtype: str = "float64", compiled: bool = False) -> Config:
    """``config`` at its own size in this dtype, without what the oracle does not know.

    Raises:
        ConfigError: verify cannot judge it.
    """
    _refuse_unknown_parts(config)
    # Of the data only the mask is kept: the batch is drawn here, and no source, path or stage has a part in it.
    data = Data(corpus="random", document_mask=config.data.document_mask or has_conversations(config))
    config = replace(config, data=data, stages=())
    wide = dtype if dtype in ("float64", "float32") else "float32"
    no_kernel = dtype == "float64" or (config.model.attention_backend == "fa4" and dtype != "bfloat16")
    return override(
        config,
        {
            "training.dtype": wide,
            "training.param_dtype": dtype,
            "training.reduce_dtype": wide,
            "compile.enable": compiled,
            "compile.async_tp": compiled and config.compile.async_tp,
            "model.attention_backend": "auto" if no_kernel else config.model.attention_backend,
            "fsdp.cpu_offload": False,
            # A miniature fits whatever it does: judged is what the whole config may need.
            "fsdp.accumulate": "whole" if config.fsdp.accumulate == "whole" or config.compile.cuda_graph else "sharded",
            # What is rounded on purpose is no error of a mesh.
            "optimizer.state_dtype": "auto",
            "optimizer.rounding": "nearest",
            "checkpoint.enable": False,
            "checkpoint.export_hf": False,
            "model.vocab_size": config.model.vocab_size or 261,
            # The oracle knows no way down.
            "lr_scheduler.decay": "constant",
        },
    )


def _telling_updates(config: Config) -> dict[str, Any]:
    """An optimizer whose every part is a large share of an update: betas and eps are the config's.

    At a rate as in training a weight moves by less than narrow dtypes tell from rounding, decay adds to that by a
    fiftieth, and a norm that is not clipped shows in nothing.
    """
    optimizer, most = config.optimizer, config.training.max_grad_norm
    return {
        "optimizer.lr": max(optimizer.lr, 1e-2),
        "optimizer.weight_decay": max(optimizer.weight_decay, 4.0) if optimizer.weight_decay else 0.0,
        "training.max_grad_norm": min(most, 0.1),
        "lr_scheduler.warmup_steps": 0,
        # Padded to 320: over 8 tp ranks the last has padding alone, the one before it both.
        "model.vocab_size": 261,
    }


def _refuse_unknown_parts(config: Config) -> None:
    own = own_routers(config)
    if config.moe.num_experts and own:
        raise ConfigError(
            f"verify's oracle knows the routers that are built in, not moe.router = {own[0]!r}.",
            "Verify the rest of the config with --moe.router topk.",
        )
    # Of a run check refuses this; of a step file nothing has yet.
    if config.moe.num_experts and config.moe.expert_dtype == "float8" and config.moe.expert_bias:
        raise ConfigError(
            "verify's oracle knows no moe.expert_bias where moe.expert_dtype = float8.",
            "Verify the rest of the config with --moe.expert_dtype param.",
        )
    if config.training.loss != "cross_entropy":
        raise ConfigError(
            f"verify's oracle knows the loss cross_entropy, not training.loss = {config.training.loss!r}.",
            "Verify the rest of the config with --training.loss cross_entropy.",
        )


def _first_legal(
    config: Config, candidates: Iterable[int], make: Callable[[int], dict[str, Any]], layouts: Sequence[Layout]
) -> Config:
    """The config changed by ``make(n)`` for the first candidate n that all layouts accept; as it was if none is."""
    for n in candidates:
        smaller = override(config, make(n))
        if legal(smaller, layouts):
            return smaller
    return config


def _shrink_widths(small: Config, whole: Config, layouts: Sequence[Layout]) -> Config:
    split = lcm(*(layout.tp for layout in layouts), *(layout.dp for layout in layouts))
    # Half precision is judged by statistics of rounding and by kernels that work in tiles: both want more of it.
    more = 3 if small.training.param_dtype == "bfloat16" else 1
    head = 8 if more == 1 else 16
    # Of 8-bit numbers 16 bytes are 16.
    tiles = 16 if more > 1 and small.moe.expert_dtype == "float8" else 1
    return override(
        small,
        {
            # Heads come next; head_dim is fixed first so that it no longer follows the width.
            "model.head_dim": head,
            **_attention_widths(whole, head, split),
            "model.dim": lcm(24 * more, split, tiles),
            "model.hidden_dim": lcm(40 * more, split),
            "moe.hidden_dim": lcm(16 * more, split),
        },
    )


def _attention_widths(whole: Config, head: int, split: int) -> dict[str, Any]:
    """Of latents, of what is rotated and of windows; a limit and a context so small that they are met."""
    model, rope, length = whole.model, whole.rope, whole.training.seq_len
    changes: dict[str, Any] = {}
    if is_latent(whole):
        changes |= {"model.kv_rank": lcm(10, split), "model.q_rank": lcm(14, split) if model.q_rank else 0}
        # FlashAttention 4 takes widths in steps of 8.
        value = 2 * head if model.attention_backend == "fa4" else head + head // 4
        changes |= {"model.nope_dim": head, "model.rope_dim": head // 2, "model.v_dim": value}
    else:
        # A run's own config names what is rotated where all of a head is.
        changes["model.rotary_dim"] = head // 2 if model.rotary_dim < model.head_dim else head
    if model.clip_qkv:
        changes["model.clip_qkv"] = 0.5
    if model.window:
        changes["model.window"] = min(model.window, 3)
    if rope.scaling == "longrope":
        pairs = (head // 2 if is_latent(whole) or model.rotary_dim < model.head_dim else head) // 2
        factors = {"rope.short_factors": rope.short_factors, "rope.long_factors": rope.long_factors}
        changes |= {key: given[:pairs] for key, given in factors.items()}
        changes["rope.original_length"] = 4 if length > rope.original_length else 1024
    return changes


def _shrink_heads(small: Config, whole: Config, layouts: Sequence[Layout]) -> Config:
    heads, kv_heads = whole.model.num_heads, whole.model.num_kv_heads
    ratio = heads // kv_heads
    axes = {layout.tp for layout in layouts}
    candidates = [
        n for n in range(1, kv_heads + 1) if all((n % tp == 0) == (kv_heads % tp == 0) for tp in axes) and n * ratio > 1
    ]
    return _first_legal(small, candidates, lambda n: {"model.num_kv_heads": n, "model.num_heads": n * ratio}, layouts)


def _shrink_experts(small: Config, whole: Config, layouts: Sequence[Layout]) -> Config:
    moe = whole.moe
    if not moe.num_experts:
        return small
    # Some experts must go unchosen, unless all are chosen at full size; the same within the groups that are kept.
    least = min(moe.num_experts, max(2 * moe.top_k, 4))
    if moe.expert_groups:
        of_group = moe.num_experts // moe.expert_groups
        spare = moe.top_k < moe.expert_groups_kept * of_group
        needed = max(-(-(moe.top_k + spare) // moe.expert_groups_kept), min(2, of_group))
        least = max(least, moe.expert_groups * needed)
    small = override(small, {"moe.num_shared_experts": min(moe.num_shared_experts, 2)})
    if small.moe.shared_hidden_dim:
        split = lcm(*(layout.tp for layout in layouts))
        small = override(small, {"moe.shared_hidden_dim": lcm(20, split)})
    return _first_legal(small, range(least, moe.num_experts + 1), lambda n: {"moe.num_experts": n}, layouts)


def _shrink_layers(small: Config, whole: Config, layouts: Sequence[Layout]) -> Config:
    total, with_experts, model = whole.model.num_layers, moe_layers(whole), whole.model
    kinds = [
        (i in with_experts, block_window(whole, i) > 0, block_rotates(whole, i), block_config(whole, i).moe)
        for i in range(total)
    ]
    distinct = list(dict.fromkeys(kinds))

    def fewer(n: int) -> dict[str, Any]:
        kept = kinds[:n]
        if set(kept) < set(kinds):
            kept = distinct + kinds[len(distinct) : n]
        chosen = tuple(i for i, (is_moe, *_) in enumerate(kept) if is_moe)
        windows = tuple("window" if window else "full" for _, window, *_ in kept)
        rotated = tuple("rope" if rotates else "none" for _, _, rotates, _ in kept)
        return {
            "model.num_layers": n,
            "moe.layers": chosen if 0 < len(chosen) < n else (),
            "moe.every": 1,
            "model.window_layers": windows if model.window_layers else (),
            "model.rope_layers": rotated if model.rope_layers else (),
            "moe.top_k_by_layer": tuple(moe.top_k for *_, moe in kept) if whole.moe.top_k_by_layer else (),
            "moe.router_by_layer": tuple(moe.router for *_, moe in kept) if whole.moe.router_by_layer else (),
        }

    return _first_legal(small, range(min(max(2, len(distinct)), total), total + 1), fewer, layouts)


def _fewest_sequences(whole: Config, layouts: Sequence[Layout]) -> tuple[int, int]:
    """Sequences of a microbatch, and of a routing group: several where the config has several; a tp divides the former
    if it divides the config's."""
    size, group = whole.training.microbatch_size, whole.moe.group_sequences
    return min(
        (
            (groups * each, each)
            for groups in range(min(2, size // group), size // group + 1)
            for each in range(min(2, group), group + 1)
            if all((groups * each % at.tp == 0) == (size % at.tp == 0) for at in layouts)
        ),
    )


def _shrink_batch(small: Config, whole: Config, layouts: Sequence[Layout]) -> Config:
    training = whole.training
    sequences, group = _fewest_sequences(whole, layouts)
    tps = lcm(*(layout.tp for layout in layouts))
    # Without sequence parallelism a length that tp does not divide must work.
    length = lcm(64 if small.training.param_dtype == "bfloat16" else 8, tps)
    if not small.mesh.sequence_parallel:
        length -= 1
    small = override(
        small,
        {
            "training.seq_len": length,
            "training.microbatch_size": sequences,
            "moe.group_sequences": group,
            "training.global_batch_size": sequences * training.global_batch_size // training.microbatch_size,
        },
    )
    most = training.global_batch_size // training.microbatch_size
    return _first_legal(
        small, range(min(2, most), most + 1), lambda n: {"training.global_batch_size": n * sequences}, layouts
    )
