"""What a block keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dtensor.estimate import saved_tensors
from moe_dtensor.estimate.saved_tensors import attention_gradient_bytes, block_bytes, tokens
from tests.verbs.test_plan import preset


def test_recomputation_keeps_less_and_needs_more_in_the_backward() -> None:
    modes = ("none", "selective", "full")
    none, selective, full = (
        block_bytes(preset("olmoe_small", "1x1x1", activation_checkpoint__mode=m), is_moe=True) for m in modes
    )
    assert none.kept > selective.kept > full.kept == 16 * 2048 * 1024 * 2
    assert none.backward < selective.backward < full.backward


def test_experts_keep_their_input_and_hidden_rows() -> None:
    """The formula of docs/log.md: 2 TD for x and 4 TKF for H in bf16."""
    config = preset("olmoe_small", "1x1x1")
    wider = preset("olmoe_small", "1x1x1", moe__hidden_dim=1024)
    tokens = 16 * 2048
    assert block_bytes(wider, True).kept - block_bytes(config, True).kept == 4 * tokens * 8 * 512


@pytest.mark.parametrize(
    ("keys", "values", "numbers"),
    [
        ({}, 2, 0),  # without a kernel deviations in place of squares
        ({"training__microbatch_size": 15}, 2 * 2, 0),  # of parts of sequences q and k also between norm and weight
        ({"mesh__sequence_parallel": False}, 2, 0),
        ({"model__qk_norm": "head"}, 2, 16),
    ],
)
def test_norm_and_rotation_keep_less_by_kernels(
    keys: dict[str, Any], values: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """olmoe_small on tp = 2: with kernels q and k before their norm, 512 wide each; of one over the whole width sums of
    squares take the place of deviations."""
    config = preset("olmoe_small", "1x1x2", **keys)
    kernels = block_bytes(config, is_moe=True).kept
    monkeypatch.setattr(saved_tensors, "has_kernel", lambda *_: False)
    plain = block_bytes(config, is_moe=True).kept
    tokens = config.training.microbatch_size * 2048
    assert plain - kernels == tokens * (2 * 512 * (values - 2) + 4 * numbers)


@pytest.mark.parametrize(
    "keys",
    [
        {"model__clip_qkv": 8.0},
        {"model__qk_norm": "head_after_rope"},
        {"model__rope_layers": ("none",)},
        {"model__rotary_dim": 32},
        {"training__param_dtype": "float64"},
    ],
)
def test_heads_that_have_no_kernel(keys: dict[str, Any]) -> None:
    assert saved_tensors.has_kernel(preset("olmoe_small", "1x1x2"), 0)
    assert not saved_tensors.has_kernel(preset("olmoe_small", "1x1x2", **keys), 0)


@pytest.mark.parametrize(("kv_heads", "sums"), [(16, 16), (4, 16 + 2 * 4)])
def test_flash_attention_4_sums_in_float32(kv_heads: int, sums: int) -> None:
    """The gradients of queries, and of keys and values that heads share, 64 wide each; it keeps what torch's does."""
    keys = {"model__num_kv_heads": kv_heads, "activation_checkpoint__mode": "selective"}
    auto, fa4 = (preset("olmoe_small", "1x1x1", model__attention_backend=way, **keys) for way in ("auto", "fa4"))
    at = tokens(fa4)
    more = attention_gradient_bytes(fa4, at) - attention_gradient_bytes(auto, at)
    assert more == 16 * 2048 * sums * 64 * 4
    assert block_bytes(fa4, True).kept == block_bytes(auto, True).kept


@pytest.mark.parametrize(("hidden", "numbers"), [(512, 2 * 512), (4096, 4096)])
def test_fused_products_write_less(hidden: int, numbers: int) -> None:
    """A row in the backward pass: no dA'; where experts are narrow no dO either, but X's gradient is wider than A'."""
    keys = {"moe__hidden_dim": hidden}
    triton, fused = (preset("olmoe_small", "1x1x1", moe__backend=way, **keys) for way in ("triton", "quack"))
    more, less = (block_bytes(config, True) for config in (triton, fused))
    copies = 16 * 2048 * 8
    assert more.backward - less.backward == copies * numbers * 2
    assert less.kept - more.kept == copies * 4


def test_attention_by_sequences_keeps_its_own_input_and_whole_weights() -> None:
    """olmoe_small on tp = 2: of what attention reads half the tokens and no sums of squares over ranks, but four
    weights of 1024 x 1024 and those of two norms."""
    keys = {"training__microbatch_size": 16}
    heads, own = (
        block_bytes(preset("olmoe_small", "1x1x2", mesh__attention=way, **keys), is_moe=True)
        for way in ("heads", "sequences")
    )
    tokens, weights = 16 * 2048, (4 * 1024 * 1024 + 2 * 1024) * 2
    assert heads.kept - own.kept == tokens // 2 * 1024 * 2 + tokens * 2 * 4 - weights
