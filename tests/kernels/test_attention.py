"""What queries see, as numbers and as FlexAttention's blocks; FlexAttention beside the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from moe_dtensor.kernels import attention as module
from moe_dtensor.kernels.attention import (
    BLOCK,
    attend,
    build_blocks,
    build_visible,
    first_visible,
    plain_attention,
    uses_flex,
)

LENGTH = 3 * BLOCK + 17


def some_documents(seed: int, share: float) -> Tensor:
    starts = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed)) < share
    return starts.long().cumsum(1)


def sees(documents: Tensor | None, window: int) -> Tensor:
    """The mask that no code of the library makes, ``(2, S, S)``."""
    at = torch.arange(LENGTH)
    behind = at[:, None] - at
    mask = (behind >= 0) & (behind < (window or LENGTH))
    return mask.expand(2, -1, -1) if documents is None else mask & (documents[:, :, None] == documents[:, None, :])


@pytest.mark.parametrize("window", [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 300])
@pytest.mark.parametrize("share", [None, 0.0, 0.004, 0.3, 1.0])
def test_first_key_and_blocks_are_those_of_the_mask(window: int, share: float | None) -> None:
    documents = None if share is None else some_documents(0, share)
    mask = sees(documents, window)
    first = first_visible(documents, window, (2, LENGTH), torch.device("cpu"))
    assert torch.equal(first, mask.int().argmax(-1).int())
    blocks = build_blocks(first)
    count = -(-LENGTH // BLOCK)
    # Beyond the end nothing is asked: as whole as what is before it.
    padded = torch.nn.functional.pad(mask.float(), (0, count * BLOCK - LENGTH) * 2, value=torch.nan)
    tiles = padded.unflatten(2, (count, BLOCK)).unflatten(1, (count, BLOCK)).movedim(3, 2)
    some, every = (tiles.nan_to_num(0) > 0).any(-1).any(-1), (tiles.nan_to_num(1) > 0).all(-1).all(-1)
    whole = chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    partial = chosen(blocks.kv_num_blocks, blocks.kv_indices)
    assert not (whole & partial).any()
    assert torch.equal(whole | partial, some)
    # The block on the diagonal is never whole, even where it has one query.
    assert torch.equal(whole, every & torch.ones(count, count, dtype=torch.bool).tril(-1))


def chosen(count: Tensor, listed: Tensor) -> Tensor:
    """``(B, R, R)`` from FlexAttention's lists."""
    result = torch.zeros(listed.shape[0], *listed.shape[2:], dtype=torch.bool)
    for b, r in torch.cartesian_prod(torch.arange(len(result)), torch.arange(result.shape[1])).tolist():
        result[b, r, listed[b, 0, r, : count[b, 0, r]].long()] = True
    return result


def test_flex_attention_is_the_plain_form_and_new_documents_recompile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # It has no backward kernel for a CPU, but a plain form of its own.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_tensors: None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention.flex_attention, backend=counter, dynamic=False)
    monkeypatch.setattr(module, "_compiled_flex_attention", lambda: compiled)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, width) for heads, width in ((4, 16), (2, 16), (2, 24)))
    sink = torch.randn(4)
    leaves = [t.requires_grad_() for t in (q, k, v, sink)]
    counts = []
    for seed in range(4):
        visible = build_visible(some_documents(seed, 0.01), 40 + seed, (2, LENGTH), q.device, flex=True, sinks=True)
        y = attend(q, k, v, visible, scale=0.3, sink_H=sink)
        right = plain_attention(q, k, v, visible.first_BS, 0.3, sink)
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        for found, expected in zip(
            torch.autograd.grad(y, leaves, dy), torch.autograd.grad(right, leaves, dy), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_a_sink_takes_its_share() -> None:
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    sink = torch.tensor([0.3, -40.0], dtype=torch.float64)
    plain = attend(q, k, v, build_visible(None, 0, (1, 7), q.device, flex=False, sinks=True), scale=0.5, sink_H=sink)
    without = attend(q, k, v, build_visible(None, 0, (1, 7), q.device, flex=False, sinks=False), scale=0.5)
    scores = (q @ k.mT * 0.5).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    share = scores.exp().sum(-1) / (scores.exp().sum(-1) + sink[:, None].exp())
    torch.testing.assert_close(plain, without * share[..., None])
    torch.testing.assert_close(plain[:, 1], without[:, 1])


def test_a_window_as_long_as_the_sequence_is_plain_causal() -> None:
    visible = build_visible(None, 7, (1, 7), torch.device("cpu"), flex=True, sinks=False)
    assert visible.first_BS is None
    assert visible.blocks is None


def test_which_way_is_taken() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert uses_flex("auto", 64, torch.bfloat16, cuda)
    assert not uses_flex("auto", 8, torch.bfloat16, cuda)
    assert not uses_flex("auto", 64, torch.float64, cuda)
    assert not uses_flex("auto", 64, torch.bfloat16, cpu)
    assert uses_flex("flex", 64, torch.bfloat16, cpu)
