from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton decides when it is first imported whether kernels are interpreted: without a GPU, on_triton/ needs a process of
# its own, which test_interpreter.py starts. With one, it runs like any other test.
collect_ignore = ["test_interpreter.py"] if CUDA else ["test_cuda.py"]
if not (CUDA or INTERPRETED):
    collect_ignore.append("on_triton")


@pytest.fixture
def poisoned_memory():
    """Fill memory with NaN when it is allocated, so that what nobody wrote shows up where it is read."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def device() -> str:
    """Where Triton kernels run: the GPU, or the CPU under the interpreter."""
    return "cuda" if CUDA else "cpu"
