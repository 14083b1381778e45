"""Every family's table. A new one is named here; ``docs/hugging_face.md`` says how."""

from __future__ import annotations

from moe_dtensor.checkpoint.hugging_face.families import attention_kinds, deepseek_likes, dense, llama_likes
from moe_dtensor.checkpoint.hugging_face.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama_likes.MIXTRAL,
        llama_likes.OLMOE,
        llama_likes.QWEN3_MOE,
        llama_likes.FLEX_OLMO,
        deepseek_likes.DOTS1,
        deepseek_likes.SOLAR_OPEN,
        deepseek_likes.ERNIE_MOE,
        deepseek_likes.HY_V3,
        deepseek_likes.SARVAM_MOE,
        deepseek_likes.KOLIBRI1,
        llama_likes.GRANITE_MOE,
        llama_likes.GRANITE_MOE_SHARED,
        llama_likes.DBRX,
        attention_kinds.QWEN2_MOE,
        attention_kinds.GLM4_MOE,
        attention_kinds.MINIMAX_M2,
        attention_kinds.EXAONE_MOE,
        attention_kinds.MELLUM,
        attention_kinds.FLINT,
        attention_kinds.AFMOE,
        attention_kinds.HUNYUAN_V1_MOE,
        attention_kinds.GPT_OSS,
        deepseek_likes.DEEPSEEK_V3,
        deepseek_likes.KIMI_K2,
        deepseek_likes.DEEPSEEK_V2,
        deepseek_likes.GLM4_MOE_LITE,
        dense.LLAMA,
        dense.MISTRAL,
        dense.QWEN2,
        dense.QWEN3,
        dense.OLMO2,
        dense.OLMO3,
        dense.GRANITE,
        dense.GPT_NEOX,
    )
}
"""By ``model_type``. ``--architecture auto`` takes the first that can hold a config."""
