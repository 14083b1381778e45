"""The expert MLP through Triton kernels, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.layer_cases import ODD_CASES, Case, relative_errors


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_equals_reference(backend, case, device, poisoned_memory):
    errors = relative_errors(case, backend, torch.float32, device)
    assert max(errors.values()) < 1e-5, errors


def test_gemms_cross_tile_edges(device, poisoned_memory):
    """Widths past one tile and not a multiple of it, and experts whose rows begin inside another's tile."""
    errors = relative_errors(Case(150, 72, 68, 3, 2, "swiglu"), "triton", torch.float32, device)
    assert max(errors.values()) < 1e-5, errors
