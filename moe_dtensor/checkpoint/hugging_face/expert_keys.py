"""Kinds of facts about experts that a config.json states: which blocks have them, groups. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_dtensor.checkpoint.hugging_face.table import Function, Raw, put


@dataclass(frozen=True)
class AllBlocks:
    """Every block has experts."""

    def read(self, raw: Raw, function: Function) -> None:
        """After the number of blocks."""
        function["moe.layers"] = tuple(range(function["model.num_layers"]))

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Nothing says so."""


@dataclass(frozen=True)
class DenseFirst:
    """The first blocks are dense (``first_k_dense_replace``), all others have experts."""

    default: int = 0
    name: str = "first_k_dense_replace"

    def read(self, raw: Raw, function: Function) -> None:
        """After the number of blocks."""
        first = raw.take((self.name,), self.default)
        every = raw.take(("moe_layer_freq",), 1)
        if every != 1:
            raw.refuse("moe_layer_freq", every, "only 1 can be expressed")
        function["moe.layers"] = tuple(range(first, function["model.num_layers"]))

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """The first MoE block's index."""
        put(raw, self.name, min(function["moe.layers"], default=function["model.num_layers"]))


@dataclass(frozen=True)
class SparseStep:
    """Every n-th block (``decoder_sparse_step``) has experts, but for those that ``mlp_only_layers`` names."""

    def read(self, raw: Raw, function: Function) -> None:
        """After the number of blocks."""
        step, dense = raw.take(("decoder_sparse_step",), 1), raw.take(("mlp_only_layers",), None) or []
        blocks = range(function["model.num_layers"])
        function["moe.layers"] = tuple(i for i in blocks if i not in dense and (i + 1) % step == 0)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """By naming the dense ones."""
        put(raw, "decoder_sparse_step", 1)
        blocks = range(function["model.num_layers"])
        put(raw, "mlp_only_layers", [i for i in blocks if i not in function["moe.layers"]])


@dataclass(frozen=True)
class LayerTypes:
    """``mlp_layer_types`` names each block dense or sparse; absent: the first ``dense`` ones are dense."""

    dense: int = 1

    def read(self, raw: Raw, function: Function) -> None:
        """After the number of blocks. ``first_k_dense_replace`` is an older name of the same."""
        count = function["model.num_layers"]
        first = raw.take(("first_k_dense_replace",), self.dense)
        kinds = raw.take(("mlp_layer_types",), ["dense"] * first + ["sparse"] * (count - first))
        if len(kinds) != count or set(kinds) - {"dense", "sparse"}:
            raw.refuse("mlp_layer_types", kinds, f"it must call each of {count} blocks dense or sparse")
        function["moe.layers"] = tuple(i for i, kind in enumerate(kinds) if kind == "sparse")

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Each block."""
        blocks = range(function["model.num_layers"])
        put(raw, "mlp_layer_types", ["sparse" if i in function["moe.layers"] else "dense" for i in blocks])
        put(raw, "first_k_dense_replace", min(function["moe.layers"], default=len(blocks)))


@dataclass(frozen=True)
class Interval:
    """ERNIE: from ``moe_layer_start_index`` to ``moe_layer_end_index`` every ``moe_layer_interval``-th block."""

    def read(self, raw: Raw, function: Function) -> None:
        """After the number of blocks."""
        count = function["model.num_layers"]
        start, end = raw.take(("moe_layer_start_index",), 1), raw.take(("moe_layer_end_index",), -1)
        step = raw.take(("moe_layer_interval",), 1)
        start, end = (max(x) if isinstance(x, list) else x for x in (start, end))
        last = count - 1 if end == -1 else end
        function["moe.layers"] = tuple(i for i in range(count) if (i + 1) % step == 0 and start <= i <= last)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """The fewest numbers that give these blocks; others where none do, which reading back then shows."""
        layers: tuple[int, ...] = function["moe.layers"] or (function["model.num_layers"],)
        step = layers[1] - layers[0] if len(layers) > 1 and (layers[0] + 1) % (layers[1] - layers[0]) == 0 else 1
        put(raw, "moe_layer_start_index", layers[0])
        put(raw, "moe_layer_end_index", layers[-1])
        put(raw, "moe_layer_interval", step)


@dataclass(frozen=True)
class Groups:
    """``n_group`` groups of experts, of which ``topk_group`` are chosen from; 1 or null: no groups."""

    def read(self, raw: Raw, function: Function) -> None:
        """As 0 and 0 where all groups are kept."""
        groups, kept = raw.take(("n_group",), 1), raw.take(("topk_group",), 1)
        same = groups == kept
        function["moe.expert_groups"], function["moe.expert_groups_kept"] = (0, 0) if same else (groups, kept)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """No groups are one group."""
        put(raw, "n_group", function["moe.expert_groups"] or 1)
        put(raw, "topk_group", function["moe.expert_groups_kept"] or 1)


@dataclass(frozen=True)
class SharedExperts:
    """Shared experts by their number, each as wide as a routed one. Null or absent: what the class takes."""

    hf: tuple[str, ...]
    default: int = 0

    def read(self, raw: Raw, function: Function) -> None:
        """After the experts' width."""
        function["moe.shared_hidden_dim"] = raw.take(self.hf, self.default) * function["moe.hidden_dim"]

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Rounded down where the width is no multiple, which reading back then shows."""
        for name in self.hf:
            put(raw, name, function["moe.shared_hidden_dim"] // function["moe.hidden_dim"])


@dataclass(frozen=True)
class GreedyGroups:
    """DeepSeek-V2: ``greedy`` over all experts, or over groups by their best expert (``group_limited_greedy``)."""

    def read(self, raw: Raw, function: Function) -> None:
        """Groups that the method does not look at are none."""
        method, groups, kept = (
            raw.take((name,), default)
            for name, default in (("topk_method", "greedy"), ("n_group", 1), ("topk_group", 1))
        )
        if method not in ("greedy", "group_limited_greedy"):
            raw.refuse("topk_method", method, "it must be greedy or group_limited_greedy")
        if method == "greedy" or groups == kept:
            return
        function["moe.expert_groups"], function["moe.expert_groups_kept"] = groups, kept
        function["moe.group_score"] = "max"

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """By method."""
        grouped = function["moe.expert_groups"] > 0
        put(raw, "topk_method", "group_limited_greedy" if grouped else "greedy")
        put(raw, "n_group", function["moe.expert_groups"] or 1)
        put(raw, "topk_group", function["moe.expert_groups_kept"] or 1)
