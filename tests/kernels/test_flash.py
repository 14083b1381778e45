"""FlashAttention 4's operators, with plain PyTorch in the place of its package: what they give and take, and that
whoever compiles or recomputes sees each as one. Its kernels are in ``test_cuda.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dtensor.kernels import flash
from moe_dtensor.kernels.attention import attend, build_visible
from moe_dtensor.parallel.apply import _selective_contexts

from .flash_package import FlashPackage

# Sequences, positions, heads, key and value heads, width, values' width.
SHAPES = [(2, 37, 4, 4, 16, 16), (3, 20, 6, 2, 8, 8), (1, 24, 4, 4, 24, 16), (2, 1, 2, 1, 8, 8), (0, 5, 2, 2, 8, 8)]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FlashPackage:
    installed = FlashPackage()
    installed.install(monkeypatch)
    return installed


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v as layers give them: heads beside one another, values a part of something wider."""
    batch, length, heads, kv_heads, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width + 8))
    q, k, v = (torch.randn(batch, length, *size, generator=generator, dtype=dtype) for size in sizes)
    return [t.transpose(1, 2).requires_grad_() for t in (q, k, v[..., 8:])]


def by_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = build_visible(None, 0, (q.shape[0], q.shape[2]), q.device, flex=True, sinks=False)
    return attend(q, k, v, visible, scale=0.3, backend="fa4")


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_causal_attention(shape: tuple[int, ...], package: FlashPackage) -> None:
    leaves = draw(shape)
    y, right = by_flash(*leaves), by_torch(*leaves)
    torch.testing.assert_close(y, right)
    assert y.transpose(1, 2).is_contiguous()
    # As a sum gives it: one number for all of a head.
    for dy in (torch.randn_like(right), torch.randn(()).double().expand(right.shape)):
        found = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        expected = torch.autograd.grad(right, leaves, dy, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert (package.forwards, package.backwards, package.deterministic) == (1, 2, False)


def test_a_deterministic_run_asks_for_it(package: FlashPackage, deterministic: None) -> None:
    by_flash(*draw(SHAPES[0])).sum().backward()
    assert package.deterministic


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators_are_what_a_compiler_is_told(shape: tuple[int, ...], package: FlashPackage) -> None:
    q, k, v = (t.detach().transpose(1, 2) for t in draw(shape, torch.bfloat16))
    operators = torch.ops.moe_dtensor
    y, lse = flash._run_forward(q, k, v, 0.3)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.flash_attention.default, (q, k, v, 0.3), test_utils=utils)
    args = (torch.randn_like(y), q, k, v, y, lse, 0.3)
    torch.library.opcheck(operators.flash_attention_backward.default, args, test_utils=utils)


# What torch's own compiler does, and hides only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_compiled_it_is_one_graph(shape: tuple[int, ...], package: FlashPackage) -> None:
    leaves = draw(shape)
    y = torch.compile(by_flash, fullgraph=True, backend="aot_eager")(*leaves)
    right = by_torch(*leaves)
    torch.testing.assert_close(y, right)
    dy = torch.randn_like(right)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(right, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)
    assert (package.forwards, package.backwards) == (1, 1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_recomputation_keeps_what_it_gives(compiled: bool, package: FlashPackage) -> None:
    def block(*leaves: Tensor) -> Tensor:
        return by_flash(*(leaf.sin() for leaf in leaves)).sin()

    def rerun(*leaves: Tensor) -> Tensor:
        return checkpoint(block, *leaves, use_reentrant=False, context_fn=_selective_contexts)

    leaves = draw(SHAPES[0])
    run = torch.compile(rerun, fullgraph=True, backend="aot_eager") if compiled else rerun
    found = torch.autograd.grad(run(*leaves).sum(), leaves)
    assert (package.forwards, package.backwards) == (1, 1)
    expected = torch.autograd.grad(by_torch(*(leaf.sin() for leaf in leaves)).sin().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_documents_windows_and_sinks_are_not_its(package: FlashPackage) -> None:
    """Without FlexAttention, as in generation, they are the plain form's."""
    q, k, v = draw(SHAPES[0])
    documents = torch.arange(37).div(10, rounding_mode="floor").expand(2, -1)
    for visible, sink in (
        (build_visible(documents, 0, (2, 37), q.device, flex=False, sinks=False), None),
        (build_visible(None, 5, (2, 37), q.device, flex=False, sinks=False), None),
        (build_visible(None, 0, (2, 37), q.device, flex=False, sinks=True), torch.zeros(4)),
    ):
        attend(q, k, v, visible, scale=0.3, sink_H=sink, backend="fa4")
    assert package.forwards == 0
