"""Every family's table. A new one is a module's ``FAMILIES`` that is named here; ``docs/hugging_face.md`` says how."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.families import (
    attention_kinds,
    bias_balanced,
    dense,
    latent,
    llama_likes,
    own_layouts,
)
from moe_dtensor.checkpoint.hugging_face.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *llama_likes.FAMILIES,
        *bias_balanced.FAMILIES,
        *own_layouts.FAMILIES,
        *attention_kinds.FAMILIES,
        *latent.FAMILIES,
        *dense.FAMILIES,
    )
}
"""By ``model_type``. ``--architecture auto`` takes the first that can hold a config."""
