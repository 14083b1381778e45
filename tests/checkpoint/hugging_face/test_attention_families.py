"""Models whose attention has a key of its own compute what transformers computes: logits, and every gradient.

In float64, in which transformers' norms, softmax, positions and routers still compute in float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.model.transformer import Transformer
from tests.checkpoint.hugging_face import tiny_models

LENGTH = 48


def read(source: HuggingFaceSource) -> dict[str, Tensor]:
    """All of our tensors, in float64."""
    values = {name: torch.empty(shape, dtype=torch.float64) for name, shape in source.shapes.items()}
    for name, value in values.items():
        source.read(name, whole(value.shape), value)
    return values


def ours(source: HuggingFaceSource) -> Transformer:
    config = source.config
    model = Transformer(config, range(config.model.num_layers)).double().eval()
    values = read(source)
    with torch.no_grad():
        for name, target in [*model.named_parameters(), *model.named_buffers()]:
            if name in values:
                target.copy_(values.pop(name))
    assert not values
    return model


def gradients_of(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """By our names: saved and read as weights are."""
    carrier = copy.deepcopy(theirs)
    with torch.no_grad():
        for (name, value), (_, original) in zip(carrier.named_parameters(), theirs.named_parameters(), strict=True):
            value.copy_(torch.zeros_like(value) if original.grad is None else original.grad)
            assert original.grad is not None or not original.requires_grad, name
    carrier.save_pretrained(folder)
    return read(HuggingFaceSource(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full) if case in tiny_models.ONLY_FULL else case
        for case in tiny_models.ATTENTION_CASES
    ],
)
def test_logits_and_every_gradient_are_transformers(case: str, tmp_path: Path) -> None:
    folder = tiny_models.save_model(case, tmp_path / "model")
    theirs = tiny_models.build_model(case)
    theirs.config._attn_implementation = theirs.config._experts_implementation = "eager"
    theirs = theirs.double()
    model = ours(HuggingFaceSource(folder))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 131, (2, LENGTH), generator=generator)
    expected = theirs(tokens, use_cache=False).logits
    found = model(tokens)[..., :131]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    right = gradients_of(theirs, tmp_path / "gradients")
    largest = max(float(value.norm()) for value in right.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        error = float((parameter.grad - right[name]).norm()) / max(float(right[name].norm()), 1e-4 * largest)
        assert error < 1e-5, (name, error)
