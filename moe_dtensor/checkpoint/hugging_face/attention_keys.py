"""Kinds of facts about attention that a config.json states: positions, windows, latents. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_dtensor.checkpoint.hugging_face.table import Function, Raw, put

FULL, WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary positions in both styles: ``rope_theta`` and ``rope_scaling`` (transformers 4), ``rope_parameters`` (5).

    After the heads' width, and after windows and latents.

    Args:
        default: theta where nothing states it.
        also: where else the older style keeps theta; read last.
        part: share of a head that is turned where nothing states it.
        alpha: a ``dynamic`` kind with an ``alpha`` is another theta, whatever the length (Hunyuan).
        part_name: where the older style keeps that share.
        by_kind: ``rope_parameters`` has an entry for full attention and one for windows.
        in_4: with ``by_kind``, transformers 4 has the class, whose ``rope_scaling`` is that of full attention.
    """

    default: float = 10000.0
    also: str = ""
    part: float = 1.0
    part_name: str = "partial_rotary_factor"
    by_kind: bool = False
    in_4: bool = False
    alpha: bool = False

    def read(self, raw: Raw, function: Function) -> None:
        """Refuse what cannot be expressed: scaling by length, two widths."""
        new, old = raw.take(("rope_parameters",), {}) or {}, raw.take(("rope_scaling",), None) or {}
        windows: Mapping[str, Any] = {}
        if self.by_kind:
            new, windows = new.get(FULL, {}) or {}, new.get(WINDOW, {}) or {}
        theta = raw.take(("rope_theta",), None)
        beside = raw.take((self.also,), None) if self.also else None
        stated = new.get("rope_theta")
        if theta is not None and stated is not None and theta != stated:
            raw.refuse("rope_theta", theta, f"rope_parameters says {stated}")
        function["model.rope_theta"] = float(next(x for x in (stated, theta, beside, self.default) if x is not None))
        self._read_width(raw, new, function)
        kinds = [where.get("rope_type", where.get("type")) for where in (old, new)]
        if all(kinds) and kinds[0] != kinds[1]:
            raw.refuse("rope_scaling", dict(old), f"rope_parameters says {kinds[1]}")
        stated = {**old, **new}
        if self.alpha and stated.get("alpha"):
            width = function["model.head_dim"]
            function["model.rope_theta"] *= stated["alpha"] ** (width / (width - 2))
            stated = {}
        self._read_scaling(raw, stated, function)
        if self.by_kind:
            self._read_windows(raw, windows, function)

    def _read_width(self, raw: Raw, new: Mapping[str, Any], function: Function) -> None:
        if function["model.kv_rank"]:
            return
        whole = function["model.head_dim"]
        part = new.get("partial_rotary_factor", raw.take((self.part_name,), None))
        width = raw.take(("rotary_dim",), None)
        if part is not None and width is not None and int(whole * part) != width:
            raw.refuse("rotary_dim", width, f"partial_rotary_factor says {int(whole * part)}")
        if width is None:
            width = int(whole * (self.part if part is None else part))
        if width % 2:
            raw.refuse(self.part_name, part, f"it turns {width} dimensions of a head, which is odd")
        function["model.rotary_dim"] = 0 if width == whole else width

    def _read_scaling(self, raw: Raw, stated: Mapping[str, Any], function: Function) -> None:
        kind = stated.get("rope_type", stated.get("type", "default"))
        if kind == "default":
            return
        if kind not in ("linear", "llama3", "yarn"):
            raw.refuse("rope_scaling", dict(stated), f"positions scaled by {kind} cannot be expressed")
            return
        function["rope.scaling"] = kind
        original = stated.get("original_max_position_embeddings")
        factor = stated.get("factor") or raw.take(("max_position_embeddings",), 0) / (original or 1)
        function["rope.factor"] = float(factor)
        if kind != "linear":
            function["rope.original_length"] = original or raw.take(("max_position_embeddings",))
        names = {"llama3": {"low": "low_freq_factor", "high": "high_freq_factor"}}.get(kind, {})
        names |= {"beta_fast": "beta_fast", "beta_slow": "beta_slow"} if kind == "yarn" else {}
        for ours, theirs in names.items():
            function[f"rope.{ours}"] = float(stated.get(theirs) or function[f"rope.{ours}"])
        if kind == "yarn":
            function["rope.truncate"] = stated.get("truncate", True)
            self._read_stretch(stated, factor, function)

    @staticmethod
    def _read_stretch(stated: Mapping[str, Any], factor: float, function: Function) -> None:
        """What cos and sin are stretched by; of latent attention the scores are too."""
        one, other = stated.get("mscale"), stated.get("mscale_all_dim")
        stretch = stated.get("attention_factor")
        if stretch is None:
            stretch = _mscale(factor, one) / _mscale(factor, other) if one and other else _mscale(factor, 1.0)
        usual = math.isclose(stretch, _mscale(factor, 1.0), rel_tol=1e-14)
        function["rope.attention_factor"] = 0.0 if usual else float(stretch)
        if function["model.kv_rank"] and other:
            function["model.attention_scale"] = function["model.head_dim"] ** -0.5 * _mscale(factor, other) ** 2

    @staticmethod
    def _read_windows(raw: Raw, windows: Mapping[str, Any], function: Function) -> None:
        kind = windows.get("rope_type", "default")
        scaled = function["rope.scaling"] != "none"
        if kind != "default":
            raw.refuse("rope_parameters", dict(windows), "windows have plain positions here")
        theta = float(windows.get("rope_theta") or function["model.rope_theta"])
        if function["model.window"]:
            function["model.window_theta"] = 0.0 if theta == function["model.rope_theta"] else theta
            function["rope.scale_windows"] = not scaled

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """Both styles at once: either reader finds its own."""
        theta, scaling = function["model.rope_theta"], self._scaling(function)
        part = self._part(function)
        put(raw, "rope_theta", theta)
        new = {"rope_theta": theta, **(scaling or {"rope_type": "default"}), **part}
        if self.by_kind:
            windows = {"rope_theta": function["model.window_theta"] or theta, "rope_type": "default", **part}
            put(raw, "rope_parameters", {FULL: new, WINDOW: windows})
            # No null: transformers 5 takes it for both kinds.
            if scaling and self.in_4:
                put(raw, "rope_scaling", scaling)
        else:
            put(raw, "rope_scaling", scaling and scaling | {"type": scaling["rope_type"]})
            put(raw, "rope_parameters", new)
        for value in part.values():
            put(raw, self.part_name, value)
            put(raw, "rotary_dim", function["model.rotary_dim"])
        if self.also:
            put(raw, self.also, theta)

    def _part(self, function: Function) -> dict[str, float]:
        width = function["model.rotary_dim"] or function["model.head_dim"]
        part = 1.0 if function["model.kv_rank"] else width / function["model.head_dim"]
        return {} if part == self.part == 1 else {"partial_rotary_factor": part}

    def _scaling(self, function: Function) -> dict[str, Any] | None:
        kind = function["rope.scaling"]
        if kind == "none":
            return None
        scaling: dict[str, Any] = {"rope_type": kind, "factor": function["rope.factor"]}
        if kind != "linear":
            scaling["original_max_position_embeddings"] = function["rope.original_length"]
        if kind == "llama3":
            scaling |= {"low_freq_factor": function["rope.low"], "high_freq_factor": function["rope.high"]}
        if kind == "yarn":
            scaling |= {name: function[f"rope.{name}"] for name in ("beta_fast", "beta_slow", "truncate")}
            scaling |= self._stretch(function)
        return scaling

    @staticmethod
    def _stretch(function: Function) -> dict[str, float]:
        """The other way round, to 15 digits."""
        factor = function["rope.factor"]
        stretch = function["rope.attention_factor"] or _mscale(factor, 1.0)
        if not (function["model.kv_rank"] and function["model.attention_scale"] and factor > 1):
            return {"attention_factor": stretch} if function["rope.attention_factor"] else {}
        other = math.sqrt(function["model.attention_scale"] * function["model.head_dim"] ** 0.5)
        slope = 0.1 * math.log(factor)
        both = {"mscale": (stretch * other - 1) / slope, "mscale_all_dim": (other - 1) / slope}
        return {name: float(f"{value:.12g}") for name, value in both.items()}


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


@dataclass(frozen=True)
class Windows:
    """Which blocks attend to a window only. After the number of blocks.

    Args:
        switch: the class looks at ``sliding_window`` only where ``use_sliding_window`` is true.
        from_layer: windows begin at block ``max_window_layers``.
        default: window of the class where config.json states none.
        kinds: the class reads ``layer_types``; else all blocks are alike.
        full_every: without ``layer_types`` every n-th block is full; 0: all have the window.
        others_full: without ``layer_types`` no block has it.
        unrotated: blocks without a window do not rotate.
    """

    switch: bool = False
    from_layer: bool = False
    default: int | None = None
    kinds: bool = False
    full_every: int = 0
    others_full: bool = False
    unrotated: bool = False

    def read(self, raw: Raw, function: Function) -> None:
        """Every block's kind; all full where there is no window."""
        count = function["model.num_layers"]
        window = raw.take(("sliding_window",), None if raw.has("sliding_window") else self.default)
        on = raw.take(("use_sliding_window",), False) if self.switch else True
        first = raw.take(("max_window_layers",), 0) if self.from_layer else 0
        stated = raw.take(("layer_types",), None)
        every = raw.take(("sliding_window_pattern", "global_attn_every_n_layers"), self.full_every)
        if isinstance(every, str):
            every = len(every) if set(every[:-1]) == {"L"} and every[-1] == "G" else raw.fail(f"pattern {every!r}")
        derived = [
            FULL if self.others_full or i < first or (every and (i + 1) % every == 0) else WINDOW for i in range(count)
        ]
        kinds = stated if stated is not None else derived
        if not window or not on:
            kinds = [FULL] * count
        if len(kinds) != count or set(kinds) - {FULL, WINDOW}:
            raw.refuse("layer_types", kinds, f"it must call each of {count} blocks {FULL} or {WINDOW}")
            return
        if stated is not None and not self.kinds and len(set(kinds)) > 1:
            raw.refuse("layer_types", kinds, "this class does not look at it")
        set_windows(function, window or 0, kinds, self.unrotated)

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """By naming each block."""
        count, window = function["model.num_layers"], function["model.window"]
        pattern = function["model.window_layers"] or (("window",) * count if window else ("full",) * count)
        put(raw, "sliding_window", window or None)
        if self.switch:
            put(raw, "use_sliding_window", bool(window))
        if self.from_layer:
            put(raw, "max_window_layers", next((i for i, kind in enumerate(pattern) if kind == "window"), count))
        if self.kinds:
            put(raw, "layer_types", [WINDOW if kind == "window" else FULL for kind in pattern])


def set_windows(function: Function, window: int, kinds: Sequence[str], unrotated: bool) -> None:
    """As :func:`.translate.function_of` has it: a pattern only where blocks differ."""
    windows = [kind == WINDOW for kind in kinds]
    function["model.window"] = window if any(windows) else 0
    mixed = any(windows) and not all(windows)
    function["model.window_layers"] = tuple("window" if w else "full" for w in windows) if mixed else ()
    rotated = tuple("rope" if w else "none" for w in windows)
    function["model.rope_layers"] = rotated if unrotated and not all(windows) else ()


@dataclass(frozen=True)
class Latent:
    """Latent attention's widths. After the heads; absent is what DeepSeek's classes take.

    Args:
        q_rank: of the class; null is none.
    """

    kv_rank: int = 512
    q_rank: int = 1536
    nope: int = 128
    rope: int = 64
    value: int = 128

    def read(self, raw: Raw, function: Function) -> None:
        """Keys and values as many as queries; only interleaved positions, as published."""
        function["model.kv_rank"] = raw.take(("kv_lora_rank",), self.kv_rank)
        absent = 0 if raw.has("q_lora_rank") else self.q_rank
        function["model.q_rank"] = raw.take(("q_lora_rank",), absent)
        function["model.nope_dim"] = raw.take(("qk_nope_head_dim",), self.nope)
        function["model.rope_dim"] = raw.take(("qk_rope_head_dim",), self.rope)
        function["model.v_dim"] = raw.take(("v_head_dim",), self.value)
        function["model.head_dim"] = function["model.nope_dim"] + function["model.rope_dim"]
        function["model.num_kv_heads"] = function["model.num_heads"]
        heads = raw.take(("num_key_value_heads",), function["model.num_heads"])
        if heads != function["model.num_heads"]:
            raw.refuse("num_key_value_heads", heads, "latent attention has a key for each query head")
        raw.take(("head_dim",), None)  # of some readers the rotated part, of others all
        raw.take(("qk_head_dim",), None)
        if not raw.take(("rope_interleave",), True):
            raw.refuse("rope_interleave", False, "published ones are interleaved")

    def write(self, function: Function, raw: dict[str, Any]) -> None:
        """All widths; a head's as readers of version 5 take it."""
        put(raw, "kv_lora_rank", function["model.kv_rank"])
        put(raw, "q_lora_rank", function["model.q_rank"] or None)
        put(raw, "qk_nope_head_dim", function["model.nope_dim"])
        put(raw, "qk_rope_head_dim", function["model.rope_dim"])
        put(raw, "v_head_dim", function["model.v_dim"])
        put(raw, "num_key_value_heads", function["model.num_heads"])
        put(raw, "head_dim", function["model.rope_dim"])
        put(raw, "rope_interleave", True)
