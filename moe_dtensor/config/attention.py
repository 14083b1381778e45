"""What the keys of attention come to in one block. Loads no torch."""

from __future__ import annotations

from typing import NamedTuple

from moe_dtensor.config.schema import Config


class Widths(NamedTuple):
    """Of one head."""

    query: int
    """Of a query or key."""
    value: int
    rotated: int
    """How much of a query or key is rotated: of latent attention the last dimensions, else the first."""


def is_latent(config: Config) -> bool:
    """Whether keys and values are made of a latent (MLA)."""
    return config.model.kv_rank > 0


def head_widths(config: Config) -> Widths:
    """Of a resolved config."""
    model = config.model
    if is_latent(config):
        return Widths(model.head_dim, model.v_dim, model.rope_dim)
    return Widths(model.head_dim, model.head_dim, model.rotary_dim)


def block_window(config: Config, layer: int) -> int:
    """Positions that a query of block ``layer`` sees, its own included; 0: all before it."""
    pattern = config.model.window_layers
    return config.model.window if not pattern or pattern[layer % len(pattern)] == "window" else 0


def block_rotates(config: Config, layer: int) -> bool:
    """Whether block ``layer`` rotates queries and keys."""
    pattern = config.model.rope_layers
    return not pattern or pattern[layer % len(pattern)] == "rope"


def sees_more_than_causal(config: Config, layer: int) -> bool:
    """Whether attention in block ``layer`` is anything but plainly causal: documents, a window, sinks."""
    window = block_window(config, layer)
    return config.data.document_mask or config.model.sinks or 0 < window < config.training.seq_len
